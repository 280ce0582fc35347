"""Keep the finished stages of a run in a folder, so that an interrupted run can resume.

``OUT.partial/`` holds the result of each finished stage and a file that marks it as done. ``OUT/`` is renamed into
place at the end, so an output folder is always complete.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from obliteratus.core.clock import Clock
from obliteratus.core.errors import UserError
from obliteratus.core.progress import note

T = TypeVar("T")


class Store:
    """Results of stages, kept in memory and, if there is a folder, on disk."""

    def __init__(self, folder: Path | None = None, clock: Clock | None = None) -> None:
        """clock: measures the stages; it may have measured others before."""
        self.folder = folder
        self.clock = clock or Clock()
        self._values: dict[str, Any] = {}

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds that each stage took, those of an interrupted run included."""
        return self.clock.seconds

    def stage(self, name: str, make: Callable[[], T], save: Callable[[T, Path], None], load: Callable[[Path], T]) -> T:
        """Return the result of a stage: the one in memory, the one of an interrupted run, or that of ``make()``.

        ``save`` and ``load`` get a folder that belongs to the stage alone.
        """
        if name in self._values:
            known: T = self._values[name]
            return known
        value = self._stage(name, make, save, load)
        self._values[name] = value
        return value

    def _stage(self, name: str, make: Callable[[], T], save: Callable[[T, Path], None], load: Callable[[Path], T]) -> T:
        done_file = self._path(f"{name}.done")
        if done_file is not None and done_file.is_file():
            self.seconds[name] = json.loads(done_file.read_text(encoding="utf-8"))["seconds"]
            note(name, "restored from the interrupted run")
            return load(done_file.with_suffix(""))
        self._log(name, "begun")
        with self.clock.time(name):
            value = make()
            if done_file is not None:
                self._save(value, save, done_file.with_suffix(""))
        if done_file is not None:
            write_atomic(done_file, json.dumps({"seconds": self.seconds[name]}))
        self._log(name, "done")
        return value

    def _save(self, value: T, save: Callable[[T, Path], None], folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)  # a killed run may have left half of it
        folder.mkdir()
        save(value, folder)

    def _path(self, name: str) -> Path | None:
        return None if self.folder is None else self.folder / name.replace(" ", "-")

    def _log(self, stage: str, status: str) -> None:
        path = self._path("events.jsonl")
        if path is not None:
            entry = {
                "time": time.time(),
                "stage": stage,
                "status": status,
                "seconds": self.seconds.get(stage),
            }
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")


def write_atomic(path: Path, text: str) -> None:
    """Write a text file atomically: write it aside, sync it and rename it."""
    aside = path.with_name(path.name + ".new")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


@contextmanager
def workspace(out: Path, identity: dict[str, Any], resume: bool) -> Iterator[Path]:
    """Yield ``OUT.partial``, locked for one run. Raises UserError if OUT is in use or the folder is of another run.

    If the run fails or is interrupted, the folder stays only if a stage in it is done, since otherwise there is nothing
    to resume. The error then says so.
    """
    check_free(out)
    partial = partial_folder(out)
    if partial.exists() and not resume:
        raise UserError(f"{partial}: this folder holds an interrupted run; add --resume to continue it, or remove it")
    partial.mkdir(parents=True, exist_ok=True)
    with lock_folder(partial):
        check_identity(partial / IDENTITY, identity)
        try:
            yield partial
        except UserError as error:
            raise UserError(f"{error}{_leave(partial)}") from error
        except KeyboardInterrupt as error:
            raise KeyboardInterrupt(_leave(partial)) from error


def _leave(partial: Path) -> str:
    """Remove a folder without a finished stage; of another, say that it can be resumed."""
    if any(partial.glob("*.done")):
        return f"; the finished stages are kept in {partial}, for --resume"
    shutil.rmtree(partial)
    return ""


IDENTITY = "identity.json"


def keep_time(partial: Path, now: datetime) -> datetime:
    """Return the time at which the run began: ``now``, or when an interrupted one did."""
    file = partial / "began"
    if not file.is_file():
        write_atomic(file, now.isoformat())
    return datetime.fromisoformat(file.read_text(encoding="utf-8"))


def partial_folder(out: Path) -> Path:
    """Return the folder in which a run works until its output is complete."""
    return out.with_name(out.name + ".partial")


def require_file(folder: Path, name: str, give: str = "the output folder of a run, such as run --out DIR") -> Path:
    """Return the path of a file in an output folder. Raises UserError, which says what to give, if it is not there."""
    path = folder / name
    if not path.is_file():
        raise UserError(f"{folder}: there is no {name}; give {give}")
    return path


def check_free(out: Path) -> None:
    """Raise UserError if the output folder exists and is not empty, or cannot be made."""
    if len(partial_folder(out).name.encode()) > LONGEST_NAME:
        raise UserError(f"{str(out)[:60]}…: the name of the output folder is too long; name another with --out")
    if out.is_symlink():
        raise UserError(f"{out}: the output folder is a symbolic link; name the folder itself with --out")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        what = "holds a finished run" if (out / "run.json").is_file() else "is in use"
        raise UserError(f"{out}: the output folder {what}; name another with --out, or remove it")
    place = next(p for p in out.absolute().parents if p.exists())
    if not place.is_dir():
        raise UserError(f"{out}: {place} is a file, so no folder can be made in it; name another with --out")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"{out}: {place} cannot be written to; name another folder with --out")


LONGEST_NAME = 255  # bytes, on all usual file systems


def check_disk(out: Path, needed: int, partial: Path | None = None) -> None:
    """Raise UserError if the disk of ``out`` has fewer than ``needed`` bytes free.

    partial: folder in which an interrupted run may have left a part of its output. It will be used or overwritten, so
    it counts as free.
    """
    place = next(p for p in [out.absolute(), *out.absolute().parents] if p.exists())
    left = [] if partial is None else [path for path in (partial / "output").rglob("*") if path.is_file()]
    free = shutil.disk_usage(place).free + sum(path.stat().st_size for path in left)
    if free < needed:
        raise UserError(
            f"{out}: this needs {needed / 1e9:.1f} GB and only {free / 1e9:.1f} GB are free; make room on the disk"
        )


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Lock a folder against other processes inside the block. Raises UserError if one has locked it already."""
    with (folder / "lock").open("w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{folder}: another process is working on this run; wait for it") from error
        yield


def check_identity(path: Path, identity: dict[str, Any]) -> None:
    """Write the identity of a run to a file, or raise UserError if the file holds a different one."""
    if not path.is_file():
        write_atomic(path, json.dumps(identity, indent=1))
        return
    known = json.loads(path.read_text(encoding="utf-8"))
    if changed := sorted(key for key in identity.keys() | known.keys() if known.get(key) != identity.get(key)):
        raise UserError(
            f"{path.parent}: the interrupted run had another {', '.join(changed)}; resume with the same, or remove it"
        )


def publish(partial: Path, out: Path) -> None:
    """Rename the finished output into place and remove the working folder."""
    if out.is_dir():
        out.rmdir()  # it is empty, since `check_free` has passed
    (partial / "output").rename(out)
    shutil.rmtree(partial)
