"""Verdicts that cost a request, kept in a folder by the content of what was asked."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from obliteratus.core.errors import UserError


def parse_json(text: str) -> Any:
    """Return the parsed text, or None if it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # the latter of brackets nested a thousand deep
        return None


@dataclass(frozen=True)
class VerdictCache:
    """Verdicts in a folder, one file each, which several processes may share."""

    folder: Path | None

    def read(self, name: str) -> bool | None:
        """Return a verdict, or None if there is none or its file is damaged."""
        if self.folder is None:
            return None
        try:
            entry = parse_json(self._path(self.folder, name).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError):
            return None
        match entry:
            case {"verdict": bool(verdict)}:
                return verdict
        return None

    def write(self, name: str, verdict: bool) -> None:
        """Write a verdict. Raises UserError if the folder cannot be written."""
        if self.folder is None:
            return
        path = self._path(self.folder, name)
        # `write_atomic` has one name aside, over which two processes would stumble, and syncs the disk each time.
        aside = path.with_suffix(f".{uuid4().hex}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            aside.write_text(json.dumps({"verdict": verdict}), encoding="utf-8")
            aside.replace(path)
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror}); give another cache folder") from error

    @staticmethod
    def _path(folder: Path, name: str) -> Path:
        return folder / name[:2] / f"{name}.json"
