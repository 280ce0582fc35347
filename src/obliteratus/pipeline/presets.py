"""Find the recipes and studies of the package by name, and those of the user by path. Nothing here needs torch."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from obliteratus.core.errors import UserError, unknown_name
from obliteratus.core.toml import parse_toml


@dataclass(frozen=True)
class PresetFolder:
    """TOML files of one kind: the presets in the package, and files of the user."""

    folder: str
    """Folder of the presets in the package."""
    file_kind: str
    """What error messages call a user's file, such as ``recipe``."""
    preset_kind: str
    """What error messages call a preset, such as ``method``."""
    see: str
    """Command that lists the presets."""

    def list_names(self) -> list[str]:
        """Return the names of all presets."""
        folder = files("obliteratus") / self.folder
        return sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml"))

    def read(self, source: str) -> dict[str, Any]:
        """Return a preset by name, or a ``.toml`` file by path, as plain data.

        Raises UserError if there is none, or if it is not TOML.
        """
        path = Path(source)
        if path.suffix == ".toml":
            if not path.is_file():
                raise UserError(f"{path}: this {self.file_kind} file does not exist")
            return {"name": path.stem, **parse_toml(path.read_bytes(), source)}
        if source not in self.list_names():
            raise UserError(unknown_name(self.preset_kind, source, self.list_names()) + f"; see '{self.see}'")
        preset = files("obliteratus") / self.folder / f"{source}.toml"
        return {"name": source, **parse_toml(preset.read_bytes(), source)}


METHODS = PresetFolder("recipes", "recipe", "method", "obliteratus methods")
STUDIES = PresetFolder("studies", "study", "preset", "obliteratus study --help")


def list_methods() -> list[str]:
    """Return the names of all methods in the package.

    >>> "balanced" in ob.list_methods()
    True
    """
    return METHODS.list_names()
