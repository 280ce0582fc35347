"""Sparse autoencoders trained elsewhere, in the files of SAELens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from obliteratus.core.errors import UserError
from obliteratus.distill.coder import Coder

NEEDED = ("W_enc", "b_enc", "W_dec", "b_dec")
# What `Coder.encode` computes: ReLU, and JumpReLU where the file has a threshold.
ARCHITECTURES = ("standard", "jumprelu")
# SAELens folds the average scaling into the weights when it saves; the other rules change every row by itself.
NORMALISATIONS = ("none", "expected_average_only_in")


def load_coder(path: str, width: int) -> Coder:
    """One coder (streams = 1, fp32). Raises UserError where the file is not one, or is for another width."""
    file = Path(path).expanduser()
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"pretrained SAE '{path}' cannot be read ({error}); give a .safetensors file") from error
    config = _config(file.with_name("cfg.json"))
    _check(path, tensors, width)
    encoder, bias, decoder, offset = (tensors[name].float() for name in NEEDED)
    if not config.get("apply_b_dec_to_input", True):  # SAELens' own default is to subtract b_dec
        bias = bias + offset @ encoder  # what our encode takes off is put back
    threshold = tensors["threshold"].float() if "threshold" in tensors else 0.0
    return Coder(encoder[None], bias[None], decoder[None], offset[None], threshold)


def _config(file: Path) -> dict[str, Any]:
    """cfg.json, or nothing where there is none. Raises UserError for a kind whose features would be misread."""
    if not file.exists():
        return {}
    config: dict[str, Any] = json.loads(file.read_text())
    for key, known in (("architecture", ARCHITECTURES), ("normalize_activations", NORMALISATIONS)):
        if config.get(key, known[0]) not in known:
            raise UserError(f"{file}: {key} '{config[key]}' is not supported; use one of {', '.join(known)}")
    return config


def _check(path: str, tensors: dict[str, Tensor], width: int) -> None:
    missing = [name for name in NEEDED if name not in tensors]
    if missing:
        raise UserError(f"pretrained SAE '{path}' has no {', '.join(missing)}; it needs {', '.join(NEEDED)} (SAELens)")
    found = tensors["W_dec"].shape[-1]
    if found != width:
        raise UserError(f"pretrained SAE '{path}' is {found} wide and this model's stream is {width}; use its own SAE")
    count = tensors["W_dec"].shape[0]
    shapes = {"W_enc": (width, count), "b_enc": (count,), "W_dec": (count, width), "b_dec": (width,)}
    shapes |= {"threshold": (count,)} if "threshold" in tensors else {}
    for name, shape in shapes.items():
        if tensors[name].shape != torch.Size(shape):
            raise UserError(f"pretrained SAE '{path}': {name} is {list(tensors[name].shape)}, not {list(shape)}")
