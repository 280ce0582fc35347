"""Reads a full-precision checkpoint on disk one tensor at a time, without building a model from it."""

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
from obliteratus.weights.names import StoredNames, StoredTensors
from obliteratus.weights.quantization import read_quantization_config
from obliteratus.weights.safetensors_io import EDITABLE_DTYPES, TORCH_DTYPES, FileHeader, TensorEntry, read_header
from obliteratus.weights.sources import ModelOrigin, check_weights, list_weight_files, locate

DOWNLOAD_PATTERNS = ["*.safetensors", "*.json"]  # weights, index and configuration; the tokenizer is the subject's
SHA256_DIGITS = 64  # the hub's cache names large files by their SHA-256


@dataclass(frozen=True)
class Checkpoint:
    """A folder of safetensors files. Its tensors go by their names in the files, its parameters by the model's."""

    name: str
    """The source as the user gave it."""
    folder: Path
    config: PreTrainedConfig
    shards: Mapping[Path, FileHeader]
    """The weight files and their headers."""
    names: StoredNames

    @cached_property
    def parameters(self) -> Mapping[str, StoredTensors]:
        """Parameter of the model → the tensors that hold it; parameters that are stored in another form are absent."""
        return self.names.find_tensors({key: entry.shape for key, (_, entry) in self._entries.items()})

    @cached_property
    def _entries(self) -> Mapping[str, tuple[Path, TensorEntry]]:
        return {key: (file, entry) for file, header in self.shards.items() for key, entry in header.entries.items()}

    def stored_name(self, parameter: str) -> str | None:
        """Return the name of the tensor that is the parameter; None if no single tensor is."""
        stored = self.parameters.get(parameter)
        return stored.key or None if stored else None

    def read(self, key: str) -> Tensor:
        """Return one tensor in its stored dtype, as a copy-on-write view of the mapped file."""
        file, offset, entry = self.locate(key)
        if entry.dtype not in TORCH_DTYPES or not entry.size:
            with safe_open(file, "pt") as opened:
                return cast(Tensor, opened.get_tensor(key))
        mapped = np.memmap(file, np.uint8, "c", offset, (entry.size,))
        return torch.from_numpy(mapped).view(TORCH_DTYPES[entry.dtype]).view(entry.shape)

    def locate(self, key: str) -> tuple[Path, int, TensorEntry]:
        """Return the file that holds a tensor, the offset of its first byte there, and its header entry."""
        file, entry = self._entries[key]
        return file, len(self.shards[file].raw) + entry.start, entry

    def holds(self, key: str) -> bool:
        """Return whether a tensor is stored under that name."""
        return key in self._entries

    def meta_tensor(self, key: str) -> Tensor:
        """Return a meta tensor of the stored shape and dtype. Raises UserError for a dtype that cannot be edited."""
        file, entry = self._entries[key]
        if entry.dtype not in EDITABLE_DTYPES:
            raise UserError(
                f"{file}: {key} is stored as {entry.dtype}, which cannot be edited in place; convert it to BF16, or "
                "leave its part out (--set excise.parts=…)"
            )
        return torch.empty(entry.shape, dtype=TORCH_DTYPES[entry.dtype], device="meta")

    @property
    def size(self) -> int:
        """Bytes of the weight files on disk."""
        return sum(file.stat().st_size for file in self.shards)

    def recorded_hash(self, file: Path) -> str:
        """Return the SHA-256 that a file should have, from the hub's cache or the run that wrote it; '' if unknown.

        Files without a recorded hash are checked by their sizes only, see `check_weights`.
        """
        blob = file.resolve().name
        if blob != file.name and len(blob) == SHA256_DIGITS:
            return blob
        return _read_recorded_hashes(self.folder).get(file.name, "")


def _read_recorded_hashes(folder: Path) -> Mapping[str, str]:
    """Return SHA-256 by file name from the folder's run.json; empty if no run wrote the folder."""
    record = folder / "run.json"
    if not record.is_file():
        return {}
    try:
        files = json.loads(record.read_text(encoding="utf-8"))["saved"]["files"]
        return {name: entry["sha256"] for name, entry in files.items()}
    except (ValueError, LookupError, TypeError):  # another program wrote it, or a version that recorded no hashes
        return {}


def find_own_checkpoint(subject: Subject) -> Checkpoint | None:
    """Return the checkpoint that the subject was loaded from; None if it is not stored as plain floats (a GGUF file, a
    quantized model) or was built in memory. Raises UserError if its files are damaged."""
    source, loaded = subject.source, str(subject.model.name_or_path)
    if source.quantization or not loaded:
        return None
    try:
        origin = locate(source.id)
    except UserError:  # an invented name, or a folder that was removed
        return None
    if origin.gguf or origin.path != loaded:
        return None
    if not origin.local:
        try:
            loaded = snapshot_download(loaded, revision=source.revision or None, local_files_only=True)
        except (OSError, ValueError, LocalEntryNotFoundError):  # no longer in the cache
            return None
    return _open_folder(source.id, Path(loaded), subject.model)


def open_checkpoint(source: str, model: Any, revision: str = "") -> Checkpoint:
    """Return the checkpoint that `source` (folder, organism:NAME, hub id) names, for `model`, a transformers model.

    Raises UserError if there is none, if it is quantized, or if its sizes differ from the model's.
    """
    origin = locate(source)
    if origin.gguf:
        raise UserError(f"{source}: a GGUF file is not a full-precision checkpoint; give a folder with safetensors")
    checkpoint = open_origin(origin, model, revision)
    if read_quantization_config(checkpoint.config):
        raise UserError(f"{source}: this checkpoint is quantized; give the full-precision checkpoint")
    _check_sizes(source, checkpoint.config, model.config)
    return checkpoint


def open_origin(origin: ModelOrigin, model: Any, revision: str = "") -> Checkpoint:
    """Return the checkpoint of a located source, downloaded from the hub if it is there.

    Raises UserError if it cannot be downloaded or its files are damaged.
    """
    folder = Path(origin.path) if origin.local else _download(origin, revision)
    return _open_folder(origin.name, folder, model)


def _open_folder(name: str, folder: Path, model: Any) -> Checkpoint:
    check_weights(ModelOrigin(name, str(folder)))
    config: PreTrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True)
    shards = {file: read_header(file) for file in list_weight_files(folder)}
    return Checkpoint(name, folder, config, shards, StoredNames(model))


def _download(origin: ModelOrigin, revision: str) -> Path:
    try:
        return Path(snapshot_download(origin.path, revision=revision or None, allow_patterns=DOWNLOAD_PATTERNS))
    except (OSError, ValueError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        cause = " ".join(str(error).split())[:200]  # long enough for any cause
        raise UserError(f"{origin.name}: cannot be downloaded: {cause}; check the name and the network") from error


def _check_sizes(source: str, config: PreTrainedConfig, expected: PreTrainedConfig) -> None:
    for name in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size"):
        stored, wanted = (getattr(c.get_text_config(), name) for c in (config, expected))
        if stored != wanted:
            raise UserError(f"{source}: its {name} is {stored}, the model's is {wanted}; give the model's own base")
