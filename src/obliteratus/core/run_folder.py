"""A run's folder while it is being made: each finished stage is kept, and nothing half-written looks finished.

``OUT.partial/`` holds what each stage gave and a mark for each stage that ended; ``OUT/`` appears at the end, whole.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from obliteratus.core.errors import UserError
from obliteratus.core.progress import note

T = TypeVar("T")


class Store:
    """Remembers stages, in a folder if it has one."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.seconds: dict[str, float] = {}
        self.values: dict[str, Any] = {}
        """What each stage gave, for those who want more than the run's summary."""

    def stage(self, name: str, make: Callable[[], T], save: Callable[[T, Path], None], load: Callable[[Path], T]) -> T:
        """``make()`` once, or what an earlier run of it left. ``save`` and ``load`` get a folder of their own."""
        if name in self.values:
            known: T = self.values[name]
            return known
        value = self._stage(name, make, save, load)
        self.values[name] = value
        return value

    def _stage(self, name: str, make: Callable[[], T], save: Callable[[T, Path], None], load: Callable[[Path], T]) -> T:
        mark = self._place(f"{name}.done")
        if mark is not None and mark.is_file():
            self.seconds[name] = json.loads(mark.read_text())["seconds"]
            note(name, "kept from the run that was interrupted")
            return load(mark.with_suffix(""))
        start = time.perf_counter()
        self._event(name, "begun")
        value = make()
        self.seconds[name] = round(time.perf_counter() - start, 3)
        if mark is not None:
            self._keep(value, save, mark, self.seconds[name])
        self._event(name, "done")
        note(name, f"{self.seconds[name]:.1f} s")
        return value

    def _keep(self, value: T, save: Callable[[T, Path], None], mark: Path, seconds: float) -> None:
        folder = mark.with_suffix("")
        shutil.rmtree(folder, ignore_errors=True)  # a stage that was killed while it wrote
        folder.mkdir()
        save(value, folder)
        write_atomic(mark, json.dumps({"seconds": seconds}))

    def _place(self, name: str) -> Path | None:
        return None if self.folder is None else self.folder / name.replace(" ", "-")

    def _event(self, stage: str, status: str) -> None:
        place = self._place("events.jsonl")
        if place is not None:
            entry = {
                "time": time.time(),
                "stage": stage,
                "status": status,
                "seconds": self.seconds.get(stage),
            }
            with place.open("a") as file:
                file.write(json.dumps(entry) + "\n")


def write_atomic(path: Path, text: str) -> None:
    """The whole text or nothing: written aside, synced, renamed."""
    aside = path.with_name(path.name + ".new")
    with aside.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


@contextmanager
def workspace(out: Path, identity: dict[str, Any], resume: bool) -> Iterator[Path]:
    """``OUT.partial``, locked, for one run. Raises UserError where OUT is in use or the run is another one.

    A user's error leaves the folder only where a stage is done in it, since only then is there something to resume.
    """
    check_free(out)
    partial = partial_folder(out)
    if partial.exists() and not resume:
        raise UserError(f"{partial}: an interrupted run lies here; add --resume to go on with it, or remove it")
    partial.mkdir(parents=True, exist_ok=True)
    with lock_folder(partial):
        check_identity(partial / "identity.json", identity)
        try:
            yield partial
        except UserError:
            if not any(partial.glob("*.done")):
                shutil.rmtree(partial)
            raise


def partial_folder(out: Path) -> Path:
    """Where a run works until its output is whole."""
    return out.with_name(out.name + ".partial")


def check_free(out: Path) -> None:
    """UserError where the output folder exists and holds anything."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: the output folder is in use; name another with --out, or remove it")


def check_disk(out: Path, needed: int, partial: Path | None = None) -> None:
    """UserError where the disk that will hold ``out`` has fewer than ``needed`` bytes free. partial: where an
    interrupted run may have left a part of its output, which is used or overwritten."""
    place = next(p for p in [out.absolute(), *out.absolute().parents] if p.exists())
    left = [] if partial is None else [path for path in (partial / "output").rglob("*") if path.is_file()]
    free = shutil.disk_usage(place).free + sum(path.stat().st_size for path in left)
    if free < needed:
        raise UserError(f"{out}: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free; make room")


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Inside, no other process works in the folder. Raises UserError where one does already."""
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{folder}: another process is working on this run; wait for it") from error
        yield


def check_identity(path: Path, identity: dict[str, Any]) -> None:
    """Keep in this file what a run is of; UserError where another run's lies there already."""
    if not path.is_file():
        write_atomic(path, json.dumps(identity, indent=1))
        return
    kept = json.loads(path.read_text())
    changed = sorted(key for key in identity if kept.get(key) != identity[key])
    if changed:
        raise UserError(f"{path.parent}: this run had another {', '.join(changed)}; resume with the same, or remove it")


def publish(partial: Path, out: Path) -> None:
    """Rename the finished output into place, then drop the rest."""
    if out.is_dir():
        out.rmdir()  # empty, or `check_free` would have refused it
    (partial / "output").rename(out)
    shutil.rmtree(partial)
