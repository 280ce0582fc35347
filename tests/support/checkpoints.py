"""Tiny checkpoints on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tests.support.tiny import tiny, tiny_tokenizer

SMALL = "20KB"  # of a shard: a tiny model then has several


def stored(folder: Path, name: str, shard: str = SMALL, **changes: Any) -> Path:
    """A tiny model on disk, under the names that transformers itself stores it by."""
    torch.manual_seed(0)  # what `tiny` leaves as it was initialized
    tiny(name, **changes).save_pretrained(folder, max_shard_size=shard)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model*.safetensors"))


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a saved model by name."""
    return {name: value for file in shards(folder) for name, value in load_file(file).items()}
