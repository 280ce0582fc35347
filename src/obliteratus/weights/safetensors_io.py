"""Reads headers of safetensors files, and writes such files piece by piece.

No tensor need be in memory whole, as it must be for safetensors' own writer.

Format: https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from obliteratus.weights.sources import INDEX

DTYPE_NAMES = {
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
TORCH_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
EDITABLE_DTYPES = ("F64", "F32", "F16", "BF16")
"""Formats in which a stored matrix can be edited: floating-point numbers that need no scale beside them."""
Pieces = Callable[[], Iterable[Tensor]]
"""Returns a tensor's parts along its first axis, in order, when they are to be written."""
ALIGNMENT = 8  # bytes of the widest numbers, which readers map into memory


def write_shard(path: Path, like: Mapping[str, Tensor], pieces: Mapping[str, Pieces]) -> None:
    """Write a safetensors file with the tensors of `like`.

    Tensors that are in `pieces` are written from there in the dtype and shape of their `like`, which may be a meta
    tensor. Pieces are asked for in the order of their names, so those of one module come one after the other.
    Raises ValueError if pieces make up another size, KeyError for a dtype that the format does not have.
    """
    starts = _plan_starts(like)
    with path.open("wb") as file:
        head = file.write(_header(starts, like))
        for name in sorted(like):
            file.seek(head + starts[name])
            parts = pieces[name]() if name in pieces else [like[name]]
            written = sum(file.write(tensor_bytes(part, DTYPE_NAMES[like[name].dtype])) for part in parts)
            if written != like[name].nbytes:
                raise ValueError(f"{name} takes {like[name].nbytes} bytes, but its pieces take {written}")


def write_index(folder: Path, files: Mapping[str, str], size: int) -> None:
    """Write the index that says which file each tensor is in. files: by tensor name; size: bytes of all tensors."""
    index = {"metadata": {"total_size": size}, "weight_map": files}
    (folder / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")


def _plan_starts(like: Mapping[str, Tensor]) -> dict[str, int]:
    """Return where each tensor begins; those of the widest numbers come first, so that all are aligned."""
    end, starts = 0, {}
    for name in sorted(like, key=lambda name: (-like[name].element_size(), name)):
        starts[name] = end
        end += like[name].nbytes
    return starts


def _header(starts: Mapping[str, int], like: Mapping[str, Tensor]) -> bytes:
    head: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for name, start in starts.items():
        head[name] = {
            "dtype": DTYPE_NAMES[like[name].dtype],
            "shape": list(like[name].shape),
            "data_offsets": [start, start + like[name].nbytes],
        }
    return _frame_header(head)


def _frame_header(head: Mapping[str, object]) -> bytes:
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def tensor_bytes(part: Tensor, dtype: str = "") -> memoryview:
    """Return the tensor's bytes, copied only if they are on another device or not contiguous.

    dtype: the format's name of the dtype that the tensor must have; ValueError if it has another.
    """
    if dtype and part.dtype != TORCH_DTYPES[dtype]:
        raise ValueError(f"a piece is {part.dtype} instead of {TORCH_DTYPES[dtype]}")
    return part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def read_at(descriptor: int, into: memoryview, offset: int) -> int:
    """Fill `into` from an open file and return the bytes read, which are fewer only if the file ends before."""
    total = 0
    while total < len(into) and (count := os.preadv(descriptor, [into[total:]], offset + total)):
        total += count
    return total


# -------------------------------------------------------------------------------- headers of existing files
@dataclass(frozen=True)
class TensorEntry:
    """A header's entry for one tensor."""

    dtype: str
    """The format's name; `TORCH_DTYPES` has those that are known here."""
    shape: tuple[int, ...]
    start: int
    """Bytes from the end of the header."""
    size: int
    """Bytes of the tensor."""


@dataclass(frozen=True)
class FileHeader:
    """The header of a file."""

    raw: bytes
    """The header's bytes, with the eight bytes of its length before them."""
    metadata: Mapping[str, str] | None
    entries: Mapping[str, TensorEntry]
    """Entries by tensor name, in the order of the tensors in the file."""


def read_header(file: Path) -> FileHeader:
    """Read the header of a file that `check_safetensors` has checked."""
    with file.open("rb") as stream:
        length = stream.read(8)
        text = stream.read(int.from_bytes(length, "little"))
    header: dict[str, Any] = json.loads(text)
    metadata = header.pop("__metadata__", None)
    entries = {name: _parse_entry(entry) for name, entry in header.items()}
    ordered = sorted(entries.items(), key=lambda item: (item[1].start, item[1].size))
    return FileHeader(length + text, metadata, dict(ordered))


def list_dtypes(folder: Path) -> set[str]:
    """Return torch's names of the dtypes in a folder's files, such as ``bfloat16``; unknown formats are left out."""
    entries = (e for file in folder.glob("*.safetensors") for e in read_header(file).entries.values())
    return {str(TORCH_DTYPES[e.dtype]).removeprefix("torch.") for e in entries if e.dtype in TORCH_DTYPES}


def _parse_entry(entry: Mapping[str, Any]) -> TensorEntry:
    start, stop = entry["data_offsets"]
    return TensorEntry(entry["dtype"], tuple(entry["shape"]), start, stop - start)


def add_entries(header: FileHeader, added: Mapping[str, Tensor]) -> FileHeader:
    """Return the header with further tensors, given by their shapes and dtypes."""
    if not added:
        return header
    entries = dict(header.entries)
    for name, like in added.items():
        new = TensorEntry(DTYPE_NAMES[like.dtype], tuple(like.shape), 0, like.nbytes)
        entries = _insert(entries, name, new)
    starts = accumulate((entry.size for entry in entries.values()), initial=0)
    entries = {
        n: TensorEntry(e.dtype, e.shape, start, e.size) for (n, e), start in zip(entries.items(), starts, strict=False)
    }
    head: dict[str, Any] = {} if header.metadata is None else {"__metadata__": header.metadata}
    for name, e in entries.items():
        head[name] = {"dtype": e.dtype, "shape": list(e.shape), "data_offsets": [e.start, e.start + e.size]}
    return FileHeader(_frame_header(head), header.metadata, entries)


def _insert(entries: dict[str, TensorEntry], name: str, new: TensorEntry) -> dict[str, TensorEntry]:
    """Insert an entry after the last tensor of numbers as wide: writers put the widest first, so all stay aligned."""
    width = _item_size(new)
    index = max((i for i, entry in enumerate(entries.values(), 1) if _item_size(entry) >= width), default=0)
    items = list(entries.items())
    return dict([*items[:index], (name, new), *items[index:]])


def _item_size(entry: TensorEntry) -> int:
    """Return the bytes of one number; 0 for an empty tensor."""
    return entry.size // max(prod(entry.shape), 1)
