"""Checkpoints whose difference from a tiny model is known."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tests.support.checkpoints import stored

from obliteratus.core.types import Plan
from obliteratus.excise.bake.base_checkpoint import BaseCheckpoint, find_base_checkpoint
from obliteratus.excise.bake.write_checkpoint import bake_into_checkpoint
from obliteratus.summon.load import open_subject
from obliteratus.summon.sites import find_tied_ends

Weights = dict[str, torch.Tensor]
WIDE = {"hidden_size": 64, "intermediate_size": 128}  # wide enough that a low rank is one, and rows are whole blocks


def make_base(folder: Path, name: str = "llama", **changes: int) -> Path:
    """A tiny model in one file."""
    return stored(folder, name, "1GB", **{**WIDE, **changes})


def change_weights(base: Path, out: Path, change: Callable[[Weights], Weights]) -> Path:
    """A copy of a model with changed weights."""
    shutil.copytree(base, out)
    weights = change(load_file(out / "model.safetensors"))
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, out / "model.safetensors")
    return out


def bake_edit(base: Path, plan: Plan, out: Path) -> Path:
    """A copy of a model with a plan in its weights, written as REBIRTH writes it."""
    subject = open_subject(base)
    files = find_base_checkpoint(subject)
    assert files is not None
    shutil.copytree(base, out, ignore=shutil.ignore_patterns("*.safetensors"))
    bake_into_checkpoint(BaseCheckpoint(subject, files, find_tied_ends(subject)), plan, out)
    return out


def change_matrices(
    parts: tuple[str, ...], change: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[[Weights], Weights]:
    """Return a function that changes the matrices whose names hold one of these words."""

    def changed(weights: Weights) -> Weights:
        return {n: change(t) if t.ndim == 2 and any(p in n for p in parts) else t for n, t in weights.items()}

    return changed
