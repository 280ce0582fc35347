"""Writes safetensors files anew: what is not replaced is copied byte for byte, a file appears whole or not at all, and
its SHA-256 is recorded. An interrupted folder is continued after its last whole file.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError
from torch import Tensor

from obliteratus.core.errors import UserError
from obliteratus.core.progress import note
from obliteratus.weights.safetensors_io import Pieces, add_entries, read_header, tensor_bytes

THREADED = 1 << 16  # bytes: handing less over to a thread takes longer than its SHA-256, which is 40 µs
CHUNK = 1 << 22  # bytes copied at once: reading gets no faster beyond 4 MB, which is little beside a matrix
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no room, no quota, longer than a file may be
OS_ERROR = re.compile(r"os error (\d+)")  # as Rust prints the system's error number


# ------------------------------------------------------------------------------------------- writing a file
@dataclass
class HashingWriter:
    """A file being written, and the SHA-256 of what was written so far.

    A thread takes the SHA-256 of a piece while the next one is computed or read, so pieces must not change afterwards.
    """

    file: IO[bytes]
    _sum: Any = field(default_factory=hashlib.sha256)
    _thread: ThreadPoolExecutor = field(default_factory=partial(ThreadPoolExecutor, 1))
    _last: Future[None] | None = None

    def write(self, data: bytes | memoryview) -> int:
        """Write all of the data and return its bytes."""
        self._wait()
        if memoryview(data).nbytes >= THREADED:
            self._last = self._thread.submit(self._sum.update, data)
        else:
            self._sum.update(data)
        return self.file.write(data)

    def hexdigest(self) -> str:
        """Return the SHA-256 of all that was written."""
        self._wait()
        return str(self._sum.hexdigest())

    def _wait(self) -> None:
        if self._last is not None:
            self._last.result()
            self._last = None


@contextmanager
def write_atomically(path: Path) -> Iterator[HashingWriter]:
    """Open a temporary file that is synced and renamed to `path` when the context ends, and removed after an error.

    Raises UserError if it cannot be written, for example because the disk is full.
    """
    temporary = path.with_name(path.name + ".new")
    try:
        with temporary.open("wb") as file:
            out = HashingWriter(file)
            yield out
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise UserError(disk_error_message(path, error)) from error
    finally:
        temporary.unlink(missing_ok=True)  # also after an interruption


def disk_error_message(path: Path, error: OSError) -> str:
    """Return one line that says what could not be written, why, and what to do."""
    cause = error.strerror or str(error)
    remedy = "make room there, or give another --out" if error.errno in DISK_FULL else "correct that"
    return f"{path}: cannot be written: {cause}; {remedy}, and run it again. The model's own files are unchanged"


@contextmanager
def explain_full_disk(folder: Path) -> Iterator[None]:
    """Turn a full disk, whoever meets it while writing into the folder, into a UserError."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise UserError(disk_error_message(folder, error)) from error
    except SafetensorError as error:
        number = OS_ERROR.search(str(error))
        if number is None or int(number[1]) not in DISK_FULL:
            raise
        raise UserError(disk_error_message(folder, OSError(int(number[1]), os.strerror(int(number[1]))))) from error


# ------------------------------------------------------------------------------------------- copying and editing
def rewrite_file(
    source: Path, target: Path, edits: Mapping[str, Pieces], added: Mapping[str, Tensor], expected_hash: str = ""
) -> str:
    """Write the tensors of ``source`` to ``target``, with its metadata and in its order, and return the SHA-256.

    edits: tensors that are written from pieces of their stored dtype and shape. added: shape and dtype of new tensors,
    whose pieces are in ``edits`` too. expected_hash: the SHA-256 that the source should have, '' if unknown. One piece
    is in memory at a time. Raises UserError if the disk is full, or the source is truncated or altered; ValueError for
    pieces of another dtype or size.
    """
    before = read_header(source)
    after = add_entries(before, added)
    with write_atomically(target) as out, source.open("rb") as opened:
        reader = HashingReader(opened, expected_hash)
        reader.skip(len(before.raw))
        out.write(after.raw)
        for name, entry in after.entries.items():
            if name in before.entries:
                reader.skip(len(before.raw) + before.entries[name].start - opened.tell())
            if name in edits:
                reader.skip(before.entries[name].size if name in before.entries else 0)
                written = sum(out.write(tensor_bytes(part, entry.dtype)) for part in edits[name]())
                if written != entry.size:
                    raise ValueError(f"{name} takes {entry.size} bytes, but its pieces take {written}")
            else:
                reader.copy(out, entry.size)
        reader.check()
    return out.hexdigest()


def copy_file(source: Path, target: Path, expected_hash: str = "") -> str:
    """Copy a file and return its SHA-256. Raises UserError if that is not `expected_hash`, unless this is ''."""
    with write_atomically(target) as out, source.open("rb") as opened:
        reader = HashingReader(opened, expected_hash)
        reader.copy(out, source.stat().st_size)
        reader.check()
    return out.hexdigest()


@dataclass
class HashingReader:
    """A file that is read once from beginning to end, and its SHA-256 if there is one to compare it with."""

    file: IO[bytes]
    expected_hash: str
    sum: Any = field(default_factory=hashlib.sha256)

    def copy(self, out: HashingWriter, size: int) -> None:
        """Copy the next `size` bytes. Raises UserError if the file ends before."""
        for data in self._chunks(size):
            out.write(data)

    def skip(self, size: int) -> None:
        """Pass over the next `size` bytes, which are read only if the SHA-256 is to be checked."""
        if not self.expected_hash:
            self.file.seek(size, os.SEEK_CUR)
            return
        for _ in self._chunks(size):
            pass

    def check(self) -> None:
        """Raise UserError if the SHA-256 of all that was read is not the expected one."""
        if self.expected_hash and self.sum.hexdigest() != self.expected_hash:
            raise UserError(
                f"{self.file.name} was altered: its SHA-256 is not the recorded {self.expected_hash[:12]}…; "
                "download it again"
            )

    def _chunks(self, size: int) -> Iterator[bytes]:
        while size:
            data = self.file.read(min(size, CHUNK))
            if not data:
                raise UserError(f"{self.file.name} is truncated: {size} bytes are missing; download it again")
            if self.expected_hash:
                self.sum.update(data)
            yield data
            size -= len(data)


def hash_file(file: Path) -> str:
    """Return the file's SHA-256 in hex digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# ------------------------------------------------------------------------------------------- folders
class FinishedFiles:
    """The record, beside a folder, of which of its files are whole, so that a killed bake continues after the last."""

    def __init__(self, folder: Path, identity: str) -> None:
        """Load the record. identity: a digest of what the files are made from; files of another identity, and files
        whose SHA-256 differs from the recorded one, are removed."""
        self._folder, self._identity = folder, identity
        recorded, recorded_identity = _read_record(folder)
        same = recorded_identity == identity
        self.sums = {name: sum for name, sum in recorded.items() if same and _matches(folder / name, sum)}
        for name in recorded.keys() - self.sums.keys():
            (folder / name).unlink(missing_ok=True)
        if self.sums:
            note("REBIRTH", f"{len(self.sums)} files of the interrupted bake are reused")
        self._write_record()

    def write(self, name: str, write: Callable[[Path], str]) -> None:
        """Have a file written by a function that returns its SHA-256, unless it is finished already."""
        if name not in self.sums:
            self.sums[name] = write(self._folder / name)
            self._write_record()

    def _write_record(self) -> None:
        with write_atomically(_record_path(self._folder)) as out:
            out.write(json.dumps({"identity": self._identity, "files": self.sums}, indent=1).encode())


def read_finished_hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of the folder's finished files by name."""
    return _read_record(folder)[0]


def remove_unfinished_files(folder: Path) -> None:
    """Create the folder if it is missing, and remove all in it that is not a finished file."""
    folder.mkdir(exist_ok=True)
    finished = read_finished_hashes(folder)
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in finished:
            path.unlink()


def remove_finished_files(folder: Path) -> None:
    """Remove the finished files and their record, because the folder is to be written in another way."""
    for name in read_finished_hashes(folder):
        (folder / name).unlink(missing_ok=True)
    _record_path(folder).unlink(missing_ok=True)


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Return ``bytes`` and ``sha256`` of each file by its path; hashes of finished files come from the record."""
    recorded = read_finished_hashes(folder)
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {
        name: {"bytes": path.stat().st_size, "sha256": recorded.get(name) or hash_file(path)}
        for name, path in paths.items()
    }


def _matches(file: Path, sum: str) -> bool:
    return file.is_file() and hash_file(file) == sum


def _read_record(folder: Path) -> tuple[dict[str, str], str]:
    """Return the recorded SHA-256 by file name, and the identity of what the files were made from."""
    path = _record_path(folder)
    record: dict[str, Any] = (
        json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"files": {}, "identity": ""}
    )
    return record["files"], record["identity"]


def _record_path(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.files.json")
