"""Safetensors files written piece by piece: no tensor need be in memory whole, as safetensors' own writer needs it.

Format: https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from obliteratus.summon.files import INDEX

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
    """like: tensors by name; those in `pieces` are written from there, in the dtype and shape of their like, which may
    be on the meta device. What belongs to one module is asked for in a row, by name.

    Raises ValueError where the pieces are more or less than that, KeyError for a dtype that the format has not.
    """
    starts = _starts(like)
    with path.open("wb") as file:
        head = file.write(_header(starts, like))
        for name in sorted(like):
            file.seek(head + starts[name])
            parts = pieces[name]() if name in pieces else [like[name]]
            written = sum(file.write(_bytes(part, like[name].dtype)) for part in parts)
            if written != like[name].nbytes:
                raise ValueError(f"{name} takes {like[name].nbytes} bytes, and its pieces {written}")


def write_index(folder: Path, files: Mapping[str, str], size: int) -> None:
    """What tells which file a tensor is in. files: by tensor name; size: bytes of all of them."""
    index = {"metadata": {"total_size": size}, "weight_map": files}
    (folder / INDEX).write_text(json.dumps(index, indent=1))


def _starts(like: Mapping[str, Tensor]) -> dict[str, int]:
    """Where each lies: the widest numbers first, so that all are aligned."""
    end, starts = 0, {}
    for name in sorted(like, key=lambda name: (-like[name].element_size(), name)):
        starts[name] = end
        end += like[name].nbytes
    return starts


def _header(starts: Mapping[str, int], like: Mapping[str, Tensor]) -> bytes:
    head: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for name, start in starts.items():
        head[name] = {
            "dtype": NAMES[like[name].dtype],
            "shape": list(like[name].shape),
            "data_offsets": [start, start + like[name].nbytes],
        }
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNED)
    return len(text).to_bytes(8, "little") + text


def _bytes(part: Tensor, dtype: torch.dtype) -> memoryview:
    """The numbers as they are in memory, copied only where they are elsewhere or not in a row."""
    if part.dtype != dtype:
        raise ValueError(f"a piece is {part.dtype}, and not {dtype}")
    return part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
