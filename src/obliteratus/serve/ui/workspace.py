"""The folder that the workbench reads from and writes to. Names that come from a browser lead nowhere else."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from obliteratus.core.choices import PROMPT_SUFFIXES
from obliteratus.core.errors import UserError
from obliteratus.core.run_folder import partial_folder
from obliteratus.prompts import read_prompts

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")
FOLDERS = ("models", "prompts", "runs", "exports", ".requests", ".uploads")
MAX_UPLOAD = 10 * 10**6  # bytes: 100 000 prompts of a hundred characters
UPLOADS = tuple(suffix for suffix in PROMPT_SUFFIXES if suffix != ".parquet")  # text alone, which is read and never run


@dataclass(frozen=True)
class FrontMember:
    """A member of the front of a search or a fit."""

    number: int
    plan: Path | None
    """Folder with its plan, or None if there is only a recipe."""
    recipe: Path | None
    """Its recipe, which `run` makes a plan from."""


@dataclass(frozen=True)
class Workspace:
    """The folder, made if it is missing."""

    root: Path

    @classmethod
    def create(cls, root: Path) -> Workspace:
        """Make the folder and what is in it. Raises UserError if that cannot be."""
        root = root.expanduser().resolve()
        try:
            for name in FOLDERS:
                (root / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{root}: the workspace cannot be made ({error.strerror}); give another --workspace"
            ) from error
        return cls(root)

    def path(self, folder: str, name: str) -> Path:
        """Return the path of a file or folder of that name in one of `FOLDERS`.

        Raises UserError for a name with other signs than letters, digits, dots, dashes and underscores, and for a link
        that leads out of the workspace.
        """
        if not NAME.fullmatch(name):
            raise UserError(f"'{name[:40]}': use letters, digits, dots, dashes and underscores, 80 at most")
        path = self.root / folder / name
        if not self.holds(path):
            raise UserError(f"{folder}/{name}: this link leads out of the workspace; copy what it points to")
        return path

    def holds(self, path: Path) -> bool:
        """Return whether a path lies in the workspace, links followed."""
        return path.resolve().is_relative_to(self.root)

    def hide_root(self, text: str) -> str:
        """Return a message with the workspace's place left out of its paths."""
        return text.replace(f"{self.root}/", "").replace(str(self.root), "the workspace")

    # ------------------------------------------------------------------------------------- prompts
    def keep_prompts(self, upload: Path, name: str) -> tuple[str, int]:
        """Move an uploaded file into ``prompts/`` if it is one of prompts; return its name there, and how many it has.

        upload: a file in ``.uploads/``. Raises UserError if it is too large, or no readable prompt file. It is removed
        then.
        """
        if not upload.resolve().is_relative_to(self.root / ".uploads"):
            raise UserError(f"{name[:40]}: this file was not uploaded; upload it")
        try:
            if upload.stat().st_size > MAX_UPLOAD:
                raise UserError(f"{name[:40]}: the file is larger than {MAX_UPLOAD // 10**6} MB; give fewer prompts")
            if Path(name).suffix.lower() not in UPLOADS:
                raise UserError(f"{name[:40]}: give one of {', '.join(UPLOADS)}")
            place = self._free_place(_plain_name(name))
            try:
                count = len(read_prompts(upload))
            except UserError as error:
                raise UserError(str(error).replace(str(upload), name[:40])) from error
            shutil.copyfile(upload, place)
            return place.name, count
        finally:
            upload.unlink(missing_ok=True)

    def _free_place(self, name: str) -> Path:
        """Return a path in ``prompts/`` that no file has yet."""
        stem, suffix = Path(name).stem, Path(name).suffix
        places = (self.path("prompts", f"{stem}{end}{suffix}") for end in ("", *(f"-{n}" for n in range(2, 10**4))))
        return next(place for place in places if not place.exists())

    def list_prompts(self) -> list[str]:
        """Return the names of the prompt files, the newest first."""
        files = [path for path in (self.root / "prompts").iterdir() if path.is_file() and self.holds(path)]
        return [path.name for path in sorted(files, key=lambda path: -path.stat().st_mtime)]

    def list_models(self) -> list[str]:
        """Return the names of the folders and GGUF files in ``models/``."""
        inside = [path for path in sorted((self.root / "models").iterdir()) if self.holds(path)]
        return [path.name for path in inside if path.is_dir() or path.suffix == ".gguf"]

    # ---------------------------------------------------------------------------------------- runs
    def new_name(self, folder: str, wish: str) -> str:
        """Return a name that nothing in the folder has yet: the wish, or with a number behind it."""
        stem = _plain_name(wish)
        for name in (stem, *(f"{stem}-{n}" for n in range(2, 10**4))):
            place = self.path(folder, name)
            if not (place.exists() or partial_folder(place).exists()):
                return name
        raise UserError(f"{stem}: there are too many of this name; give another")

    def list_runs(self) -> list[str]:
        """Return the names of the finished runs, the newest first."""
        return self._list_saved("runs")

    def _list_saved(self, folder: str) -> list[str]:
        saved = [path for path in (self.root / folder).iterdir() if path.suffix not in (".partial", ".saving")]
        found = [path for path in saved if (path / "run.json").is_file() and self.holds(path)]
        return [path.name for path in sorted(found, key=lambda path: -(path / "run.json").stat().st_mtime)]

    def list_exports(self) -> list[str]:
        """Return the names of what was saved in another form, the newest first."""
        return self._list_saved("exports")

    def list_interrupted(self) -> list[str]:
        """Return the names of the runs that can be resumed."""
        partials = sorted((self.root / "runs").glob("*.partial"))
        names = [path.name.removesuffix(".partial") for path in partials if any(path.glob("*.done"))]
        return [name for name in names if self.request_file(name).is_file()]

    def request_file(self, name: str) -> Path:
        """Return the file that says what was asked for in a run."""
        return self.path(".requests", f"{name}.json")

    def discard(self, name: str) -> None:
        """Remove what an interrupted run has left."""
        shutil.rmtree(partial_folder(self.path("runs", name)), ignore_errors=True)
        self.request_file(name).unlink(missing_ok=True)

    def list_front(self, name: str) -> list[FrontMember]:
        """Return the members of a run's front, from gentle to thorough as they are numbered; none without one."""
        front = self.path("runs", name) / "front"
        numbers = {int(path.stem) for path in front.glob("*") if path.stem.isdecimal()}
        return [_read_member(front, number) for number in sorted(numbers)]

    def describe_front(self, name: str) -> dict[int, str]:
        """Return what is known of each member of a front, as one line; {} if nothing is."""
        front = self.path("runs", name) / "front"
        if (front / "front.json").is_file():
            entries = json.loads((front / "front.json").read_text(encoding="utf-8"))
            return {e["number"]: f"rate {e['rate']:.1%}, KL {e['kl']:.3f} on search prompts" for e in entries}
        recipes = {m.number: m.recipe for m in self.list_front(name) if m.recipe}
        heads = {number: file.read_text(encoding="utf-8").split("\n", 1)[0] for number, file in recipes.items()}
        return {number: head.removeprefix("# ") for number, head in heads.items()}


def _read_member(front: Path, number: int) -> FrontMember:
    plan, recipe = front / str(number), front / f"{number}.toml"
    return FrontMember(number, plan if plan.is_dir() else None, recipe if recipe.is_file() else None)


def _plain_name(wish: str) -> str:
    """Return a name as `NAME` allows it, as like the wish as can be."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(wish).name).strip("-._")[-60:]
    return plain.lstrip("-._") or "unnamed"


def list_files(folder: Path) -> Sequence[Path]:
    """Return the files below a folder in order, links left out."""
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink()]
