"""Whether a source can name a model at all, before anything is imported to open it."""

from __future__ import annotations

import os
import re
from pathlib import Path

from obliteratus.core.errors import UserError
from obliteratus.weights.organism_files import find_data_folder, parse_share

LONGEST_NAME = 255  # bytes of a file's name, on all usual systems
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def check_source(source: str) -> None:
    """Raise UserError for what is no `organism:NAME[@SHARE]`, no folder, no GGUF file, and cannot be a hub id."""
    if source.startswith("organism:"):
        name = parse_share(source.removeprefix("organism:"))[0]
        if name != "base":
            find_data_folder(name)
        return
    path = Path(source).expanduser()
    if len(os.fsencode(path.name)) > LONGEST_NAME:
        raise UserError(
            f"{source[:60]}…: no model has such a name; give a folder, a .gguf file or a hub id (owner/name)"
        )
    if path.is_file() and path.suffix != ".gguf":
        raise UserError(f"{path} is a file; give a model folder, a .gguf file or a hub id")
    if not path.exists() and (path.is_absolute() or path.suffix == ".gguf" or not HUB_ID.fullmatch(source)):
        raise UserError(f"{path} does not exist; give a model folder, a .gguf file or a hub id (owner/name)")
