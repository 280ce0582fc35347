"""A full-precision checkpoint on disk, read one tensor at a time: no model is built from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from obliteratus.errors import UserError
from obliteratus.summon.files import Origin, check_weights, locate, weight_files
from obliteratus.summon.storage import mark_of

PATTERNS = ["*.safetensors", "*.json"]  # weights, index and configuration; the tokenizer is the subject's


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by their names in the files."""

    name: str
    """As the user gave it."""
    config: PreTrainedConfig
    shards: Mapping[Path, Sequence[str]]
    """File → names in it, in the files' own order."""
    prefix: str
    """What module paths of a whole model begin with, and names of a file with the backbone alone may lack."""

    def key(self, parameter: str) -> str | None:
        """The name under which a parameter of the model is stored; None where it is not, or not by itself."""
        known = {name for names in self.shards.values() for name in names}
        bare = parameter.removeprefix(f"{self.prefix}.")
        return parameter if parameter in known else bare if bare in known else None

    def tensor(self, key: str) -> Tensor:
        """One tensor, in the dtype that it is stored in. A view of the file where the platform allows."""
        file = next(file for file, names in self.shards.items() if key in names)
        with safe_open(file, "pt") as opened:
            tensor: Tensor = opened.get_tensor(key)
        return tensor

    def like(self, key: str) -> Tensor:
        """Its shape and dtype, as a tensor without numbers."""
        return self.tensor(key).to("meta")  # of a file in memory's map, nothing is read

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(file.stat().st_size for file in self.shards)


def open_checkpoint(source: str, model: Any, revision: str = "") -> Checkpoint:
    """The checkpoint that `source` (folder, organism:NAME, hub id) names. UserError where there is none, it is
    quantised itself, or of other sizes than ``model``, a transformers model."""
    origin = locate(source)
    if origin.gguf:
        raise UserError(f"{source}: a GGUF file is no full-precision checkpoint; give a folder with safetensors")
    folder = Path(origin.path) if origin.local else _fetched(origin, revision)
    check_weights(Origin(source, str(folder)))
    config: PreTrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True)
    if mark_of(config):
        raise UserError(f"{source}: is quantised itself; give the full-precision checkpoint")
    _check_sizes(source, config, model.config)
    shards: dict[Path, list[str]] = {}
    for file in weight_files(folder):
        with safe_open(file, "pt") as opened:
            shards[file] = list(opened.keys())
    return Checkpoint(source, config, shards, str(model.base_model_prefix))


def _fetched(origin: Origin, revision: str) -> Path:
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
