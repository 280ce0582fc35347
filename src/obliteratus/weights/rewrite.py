"""Safetensors files written again: what is not replaced is copied byte for byte, each file appears whole or not at all,
and its SHA-256 is told. A folder of them is gone on with where a kill ended it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError
from torch import Tensor

from obliteratus.core.errors import UserError
from obliteratus.core.progress import note
from obliteratus.weights.safetensors_io import Pieces, add_entries, read_header, tensor_bytes

CHUNK = 1 << 22  # bytes copied at once: 4 MB is past where reading gets no faster, and is nothing beside a matrix
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of writing: no room, no quota, longer than a file may be


@dataclass
class Output:
    """A file being written, and the sum of what is in it so far."""

    file: IO[bytes]
    sum: Any = field(default_factory=hashlib.sha256)

    def write(self, data: bytes | memoryview) -> int:
        """Bytes written: all of them."""
        self.sum.update(data)
        return self.file.write(data)


@contextmanager
def write_aside(path: Path) -> Iterator[Output]:
    """A file that gets its name when the block ends, synced to the disk; after an error there is none. UserError where
    it cannot be written, because the disk is full for one."""
    place = path.with_name(path.name + ".new")
    try:
        with place.open("wb") as file:
            out = Output(file)
            yield out
            file.flush()
            os.fsync(file.fileno())
        place.replace(path)
    except OSError as error:
        raise UserError(disk_error_message(path, error)) from error
    finally:
        place.unlink(missing_ok=True)  # what is half written goes, also at an interruption


def disk_error_message(path: Path, error: OSError) -> str:
    """What a user can do about it, in one line."""
    cause = error.strerror or str(error)
    remedy = "make room there, or give another --out" if error.errno in FULL else "mend that"
    return f"{path}: cannot be written: {cause}; {remedy}, and run it again. The model's own files are as they were"


@contextmanager
def explain_full_disk(folder: Path) -> Iterator[None]:
    """A full disk, met by whoever writes into the folder, as a UserError."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise UserError(disk_error_message(folder, error)) from error
    except SafetensorError as error:
        number = OS_ERROR.search(str(error))
        if number is None or int(number[1]) not in FULL:
            raise
        raise UserError(disk_error_message(folder, OSError(int(number[1]), os.strerror(int(number[1]))))) from error


OS_ERROR = re.compile(r"os error (\d+)")  # as Rust writes what the system said


def rewrite_file(
    source: Path, target: Path, edits: Mapping[str, Pieces], added: Mapping[str, Tensor], known: str = ""
) -> str:
    """SHA-256 of ``target``: the tensors of ``source`` in their order, with its metadata; those in ``edits``, which
    have the stored dtype and shape, come from there. added: shape and dtype of further tensors, whose numbers are in
    ``edits`` too. known: SHA-256 that the source should have. One tensor, or one piece of it, is in memory at a time.

    Raises UserError where the disk is full, or the source too short or not the known one; ValueError for pieces of
    another dtype or size.
    """
    before = read_header(source)
    after = add_entries(before, added)
    with write_aside(target) as out, source.open("rb") as opened:
        given = Source(opened, known)
        given.pass_over(len(before.raw))
        out.write(after.raw)
        for name, entry in after.entries.items():
            if name in before.entries:
                given.pass_over(len(before.raw) + before.entries[name].start - opened.tell())
            if name in edits:
                given.pass_over(before.entries[name].size if name in before.entries else 0)
                written = sum(out.write(tensor_bytes(part, entry.dtype)) for part in edits[name]())
                if written != entry.size:
                    raise ValueError(f"{name} takes {entry.size} bytes, and its pieces {written}")
            else:
                given.copy(out, entry.size)
        given.check()
    return str(out.sum.hexdigest())


def copy_file(source: Path, target: Path, known: str = "") -> str:
    """SHA-256 of a file and of its copy; UserError where it is not the known one."""
    with write_aside(target) as out, source.open("rb") as opened:
        given = Source(opened, known)
        given.copy(out, source.stat().st_size)
        given.check()
    return str(out.sum.hexdigest())


@dataclass
class Source:
    """A file read from its beginning to its end, once, and the sum of what was read if one is known."""

    file: IO[bytes]
    known: str
    sum: Any = field(default_factory=hashlib.sha256)

    def copy(self, out: Output, size: int) -> None:
        """So many bytes, from where it stands."""
        for data in self._parts(size):
            out.write(data)

    def pass_over(self, size: int) -> None:
        """So many bytes that are not copied: they are read only where a sum is to be checked."""
        if not self.known:
            self.file.seek(size, os.SEEK_CUR)
            return
        for _ in self._parts(size):
            pass

    def check(self) -> None:
        """UserError where all that was read has not the known sum."""
        if self.known and self.sum.hexdigest() != self.known:
            raise UserError(
                f"{self.file.name} was altered: its SHA-256 is not the recorded {self.known[:12]}…; fetch it again"
            )

    def _parts(self, size: int) -> Iterator[bytes]:
        while size:
            data = self.file.read(min(size, CHUNK))
            if not data:
                raise UserError(f"{self.file.name} is truncated: {size} bytes are missing; download it again")
            if self.known:
                self.sum.update(data)
            yield data
            size -= len(data)


def sha256_of(file: Path) -> str:
    """The file's SHA-256, as hex digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class Finished:
    """Which files of a folder are whole, kept beside the folder: a bake that was killed goes on behind the last one."""

    def __init__(self, folder: Path, identity: str) -> None:
        """identity: of what the files are made from. Those of another, or without their sum, are removed."""
        self._folder, self._identity = folder, identity
        known, whose = _read(folder)
        self.sums = {n: s for n, s in known.items() if whose == identity and _has_sum(folder / n, s)}
        for name in known.keys() - self.sums.keys():
            (folder / name).unlink(missing_ok=True)
        if self.sums:
            note("REBIRTH", f"{len(self.sums)} files kept from the bake that was interrupted")
        self._keep()

    def file(self, name: str, make: Callable[[Path], str]) -> None:
        """Have it written, by what returns its SHA-256, unless it is there."""
        if name not in self.sums:
            self.sums[name] = make(self._folder / name)
            self._keep()

    def _keep(self) -> None:
        with write_aside(_record(self._folder)) as out:
            out.write(json.dumps({"identity": self._identity, "files": self.sums}, indent=1).encode())


def finished_files(folder: Path) -> dict[str, str]:
    """SHA-256 by name of the files in it that were written whole."""
    return _read(folder)[0]


def tidy_folder(folder: Path) -> None:
    """The folder is there, and holds nothing but what `finished_files` knows of."""
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in finished_files(folder):
            path.unlink()


def forget_finished(folder: Path) -> None:
    """Remove what `finished_files` knows of: it is to be written in another way."""
    for name in finished_files(folder):
        (folder / name).unlink(missing_ok=True)
    _record(folder).unlink(missing_ok=True)


def file_sums(folder: Path) -> dict[str, dict[str, Any]]:
    """``bytes`` and ``sha256`` of each file; of what was baked, as it was told while it was written."""
    known = finished_files(folder)
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    return {p.name: {"bytes": p.stat().st_size, "sha256": known.get(p.name) or sha256_of(p)} for p in paths}


def _has_sum(file: Path, known: str) -> bool:
    return file.is_file() and sha256_of(file) == known


def _read(folder: Path) -> tuple[dict[str, str], str]:
    """What is kept of a folder: the files' sums, and what they were made from."""
    place = _record(folder)
    kept: dict[str, Any] = json.loads(place.read_text()) if place.is_file() else {"files": {}, "identity": ""}
    return kept["files"], kept["identity"]


def _record(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.files.json")
