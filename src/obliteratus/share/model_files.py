"""The sums of all files that a model is loaded from."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from huggingface_hub import snapshot_download, try_to_load_from_cache
from pydantic import Field

from obliteratus.core.progress import progress
from obliteratus.core.settings import FrozenModel
from obliteratus.share.hub import explain_hub_errors
from obliteratus.summon.fingerprint import KINDS
from obliteratus.weights.sources import ModelOrigin, locate

PATTERNS = (*(pattern for patterns in KINDS.values() for pattern in patterns), "*.py")
"""Weights, configuration, tokenizer, chat templates, and code that comes with a model."""
GGUF = "model.gguf"
"""What the only file of a model is called, whatever its name is."""
CHUNK = 2**22  # bytes that are read at once: few enough for the cache, and enough for a disk to read at its rate
SHA256 = re.compile(r"[0-9a-f]{64}")


class FileSum(FrozenModel):
    """Size and sum of one file."""

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=f"^{SHA256.pattern}$")


def sum_model_files(source: str, revision: str = "") -> dict[str, FileSum]:
    """Return the sums of a model's files by their names in its folder. Raises UserError if the source is no model.

    revision: commit of a model on the hub, whose files have to be in the cache.
    """
    origin = locate(source)
    folder = find_model_folder(origin, revision)
    files = [] if folder is None else list_model_files(origin, folder)
    with progress("FILES summed, MB", sum(file.stat().st_size for file in files) // 10**6) as advance:
        sums = {}
        for file in files:
            sums[GGUF if origin.gguf else file.relative_to(folder or file).as_posix()] = sum_file(file)
            advance(file.stat().st_size // 10**6)
    return sums


def fetch_model_files(source: str, revision: str, names: Iterable[str]) -> None:
    """Download the files of a model on the hub that are not in the cache yet. Raises UserError if that fails."""
    if not locate(source).local:
        with explain_hub_errors(source):
            snapshot_download(source, revision=revision or None, allow_patterns=list(names))


def find_model_folder(origin: ModelOrigin, revision: str = "") -> Path | None:
    """Return the folder with the model's files: of a hub id that of the cache, or None if it is not there."""
    if origin.local:
        return Path(origin.path)
    found = try_to_load_from_cache(origin.path, "config.json", revision=revision or None)
    return Path(found).parent if isinstance(found, str) else None


def list_model_files(origin: ModelOrigin, folder: Path) -> Sequence[Path]:
    """Return the files that the model is loaded from, sorted by name."""
    if origin.gguf:
        return [folder / origin.gguf]
    return sorted({file for pattern in PATTERNS for file in folder.glob(pattern) if file.is_file()})


def sum_file(file: Path) -> FileSum:
    """Return size and SHA-256. In the hub's cache a large file bears its SHA-256 as its name, and is not read."""
    size, real = file.stat().st_size, file.resolve()
    if real.parent.name == "blobs" and SHA256.fullmatch(real.name):
        return FileSum(bytes=size, sha256=real.name)
    hashed = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(CHUNK):
            hashed.update(block)
    return FileSum(bytes=size, sha256=hashed.hexdigest())
