"""A safetensors file written piece by piece: no tensor need be in memory whole, as safetensors' own writer needs it.

Format: https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
Pieces = Callable[[], Iterable[Tensor]]
"""Gives a tensor's parts along its first axis, in order, when they are to be written."""
ALIGNED = 8  # bytes: readers map the file into memory, and the widest numbers take so many


def write_shard(path: Path, like: Mapping[str, Tensor], pieces: Mapping[str, Pieces]) -> None:
    """like: tensors by name; those in `pieces` are written from there, in the dtype and shape of their like.

    Raises ValueError where the pieces are more or less than that, KeyError for a dtype that the format has not.
    """
    names = sorted(like, key=lambda name: (-like[name].element_size(), name))  # so that each starts aligned
    with path.open("wb") as file:
        file.write(_header(names, like))
        for name in names:
            parts = pieces[name]() if name in pieces else [like[name]]
            written = sum(file.write(_bytes(part, like[name].dtype)) for part in parts)
            if written != like[name].nbytes:
                raise ValueError(f"{name} takes {like[name].nbytes} bytes, and its pieces {written}")


def _header(names: list[str], like: Mapping[str, Tensor]) -> bytes:
    head: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        start, end = end, end + like[name].nbytes
        head[name] = {
            "dtype": NAMES[like[name].dtype],
            "shape": list(like[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNED)
    return len(text).to_bytes(8, "little") + text


def _bytes(part: Tensor, dtype: torch.dtype) -> memoryview:
    """The numbers as they are in memory, copied only where they are elsewhere or not in a row."""
    if part.dtype != dtype:
        raise ValueError(f"a piece is {part.dtype}, and not {dtype}")
    return part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
