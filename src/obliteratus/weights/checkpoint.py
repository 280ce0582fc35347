"""A full-precision checkpoint on disk, read one tensor at a time: no model is built from it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from obliteratus.core.errors import UserError
from obliteratus.core.types import Subject
from obliteratus.weights.names import StoredNames, StoredParameter
from obliteratus.weights.quantization import quantization_entry
from obliteratus.weights.safetensors_io import DTYPES, FLOATS, Entry, Header, read_header
from obliteratus.weights.sources import ModelOrigin, check_weights, locate, weight_files

PATTERNS = ["*.safetensors", "*.json"]  # weights, index and configuration; the tokenizer is the subject's
SHA256 = 64  # hex digits: what the hub's cache calls a large file by


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by their names in the files."""

    name: str
    """As the user gave it."""
    folder: Path
    config: PreTrainedConfig
    shards: Mapping[Path, Header]
    """Files with weights, and what their heads say."""
    naming: StoredNames

    @cached_property
    def where(self) -> Mapping[str, StoredParameter]:
        """By parameter of the model, what it is stored as; without those that are stored in another form."""
        return self.naming.where({key: entry.shape for key, (_, entry) in self._places.items()})

    @cached_property
    def _places(self) -> Mapping[str, tuple[Path, Entry]]:
        return {key: (file, entry) for file, header in self.shards.items() for key, entry in header.entries.items()}

    def key(self, parameter: str) -> str | None:
        """The name under which a parameter of the model is stored; None where it is not, or not by itself."""
        found = self.where.get(parameter)
        return found.key or None if found else None

    def tensor(self, key: str) -> Tensor:
        """One tensor, in the dtype that it is stored in: a view of its part of the file, read as it is looked at.
        Writing into it leaves the file as it is."""
        file, offset, entry = self.place(key)
        if entry.dtype not in DTYPES or not entry.size:
            with safe_open(file, "pt") as opened:
                return cast(Tensor, opened.get_tensor(key))
        mapped = np.memmap(file, np.uint8, "c", offset, (entry.size,))
        return torch.from_numpy(mapped).view(DTYPES[entry.dtype]).view(entry.shape)

    def place(self, key: str) -> tuple[Path, int, Entry]:
        """The file that holds a tensor, where in it its bytes begin, and what its head says of it."""
        file, entry = self._places[key]
        return file, len(self.shards[file].raw) + entry.start, entry

    def holds(self, key: str) -> bool:
        """Whether a tensor is stored under that name."""
        return key in self._places

    def like(self, key: str) -> Tensor:
        """Its shape and dtype, as a tensor without numbers. UserError for a dtype that is edited nowhere."""
        file, entry = self._places[key]
        if entry.dtype not in FLOATS:
            raise UserError(
                f"{file}: {key} is stored as {entry.dtype}, which cannot be edited in place; convert it to BF16, or "
                "leave its part out (--set excise.parts=…)"
            )
        return torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device="meta")

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(file.stat().st_size for file in self.shards)

    def known_sum(self, file: Path) -> str:
        """SHA-256 that a file should have: from the run that wrote it, or from the hub; empty where none is known. The
        rest is told by sizes alone, see `check_weights`."""
        blob = file.resolve().name
        if blob != file.name and len(blob) == SHA256:
            return blob
        return recorded_sums(self.folder).get(file.name, "")


def recorded_sums(folder: Path) -> Mapping[str, str]:
    """SHA-256 by file, as the run told that wrote the folder; empty where none did."""
    place = folder / "run.json"
    if not place.is_file():
        return {}
    try:
        files = json.loads(place.read_text())["saved"]["files"]
        return {name: about["sha256"] for name, about in files.items()}
    except (ValueError, LookupError, TypeError):  # written by another program, or by us before there were sums
        return {}


def own_checkpoint(subject: Subject) -> Checkpoint | None:
    """The files that the subject was loaded from, where they hold it in plain floats; None where there are none, as of
    a GGUF file, a quantised model, or one that was put together in memory. UserError where they are not whole."""
    source, loaded = subject.source, str(subject.model.name_or_path)
    if source.quantisation or not loaded:
        return None
    try:
        origin = locate(source.id)
    except UserError:  # a name that was made up, or a folder that is gone
        return None
    if origin.gguf or origin.path != loaded:
        return None
    if not origin.local:
        try:
            loaded = snapshot_download(loaded, revision=source.revision or None, local_files_only=True)
        except (OSError, ValueError, LocalEntryNotFoundError):  # not in the cache any more
            return None
    return _opened(source.id, Path(loaded), subject.model)


def open_checkpoint(source: str, model: Any, revision: str = "") -> Checkpoint:
    """The checkpoint that `source` (folder, organism:NAME, hub id) names. UserError where there is none, it is
    quantised itself, or of other sizes than ``model``, a transformers model."""
    origin = locate(source)
    if origin.gguf:
        raise UserError(f"{source}: a GGUF file is no full-precision checkpoint; give a folder with safetensors")
    known = _opened(source, Path(origin.path) if origin.local else _fetched(origin, revision), model)
    if quantization_entry(known.config):
        raise UserError(f"{source}: is quantised itself; give the full-precision checkpoint")
    _check_sizes(source, known.config, model.config)
    return known


def _opened(name: str, folder: Path, model: Any) -> Checkpoint:
    check_weights(ModelOrigin(name, str(folder)))
    config: PreTrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True)
    shards = {file: read_header(file) for file in weight_files(folder)}
    return Checkpoint(name, folder, config, shards, StoredNames(model))


def open_files(origin: ModelOrigin, model: Any, revision: str = "") -> Checkpoint:
    """What `locate` found, of which the files are whole; from the hub they are fetched."""
    return _opened(origin.name, Path(origin.path) if origin.local else _fetched(origin, revision), model)


def _fetched(origin: ModelOrigin, revision: str) -> Path:
    try:
        return Path(snapshot_download(origin.path, revision=revision or None, allow_patterns=PATTERNS))
    except (OSError, ValueError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        cause = " ".join(str(error).split())[:200]  # enough for any cause
        raise UserError(f"{origin.name}: cannot be fetched: {cause}; check the name and the network") from error


def _check_sizes(source: str, config: PreTrainedConfig, expected: PreTrainedConfig) -> None:
    for name in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size"):
        here, there = (getattr(c.get_text_config(), name) for c in (config, expected))
        if here != there:
            raise UserError(f"{source}: its {name} is {here}, that of the model {there}; give the model's own base")
