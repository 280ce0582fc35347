"""Safetensors files written piece by piece: no tensor need be in memory whole, as safetensors' own writer needs it.

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
DTYPES = {name: dtype for dtype, name in NAMES.items()}
FLOATS = ("F64", "F32", "F16", "BF16")
"""What a matrix can be stored in to be edited: whole floating numbers, which need no scale beside them."""
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
            written = sum(file.write(tensor_bytes(part, NAMES[like[name].dtype])) for part in parts)
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
    return _framed(head)


def _framed(head: Mapping[str, object]) -> bytes:
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNED)
    return len(text).to_bytes(8, "little") + text


def tensor_bytes(part: Tensor, dtype: str = "") -> memoryview:
    """The bytes as they are in memory, copied only where they are elsewhere or not in a row. ValueError unless they are
    of that dtype, as the format names it, if one is given."""
    if dtype and part.dtype != DTYPES[dtype]:
        raise ValueError(f"a piece is {part.dtype}, and not {DTYPES[dtype]}")
    return part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def read_fully(descriptor: int, into: memoryview, offset: int) -> int:
    """Bytes read from an open file: all that there is room for, or fewer where it ends."""
    done = 0
    while done < len(into) and (got := os.preadv(descriptor, [into[done:]], offset + done)):
        done += got
    return done


# -------------------------------------------------------------------------------- files that are there
@dataclass(frozen=True)
class Entry:
    """What a header says of one tensor."""

    dtype: str
    """As the format names it; `DTYPES` has those that torch and this program both know."""
    shape: tuple[int, ...]
    start: int
    """Bytes behind the header."""
    size: int
    """Bytes."""


@dataclass(frozen=True)
class Header:
    """The head of a file, as it stands there."""

    raw: bytes
    """With the eight bytes of its length."""
    metadata: Mapping[str, str] | None
    entries: Mapping[str, Entry]
    """By name, in the order of their bytes."""


def read_header(file: Path) -> Header:
    """The head of a file that `check_safetensors` has passed."""
    with file.open("rb") as stream:
        length = stream.read(8)
        text = stream.read(int.from_bytes(length, "little"))
    known: dict[str, Any] = json.loads(text)
    metadata = known.pop("__metadata__", None)
    found = {name: _entry(entry) for name, entry in known.items()}
    ordered = sorted(found.items(), key=lambda item: (item[1].start, item[1].size))
    return Header(length + text, metadata, dict(ordered))


def dtypes_in(folder: Path) -> set[str]:
    """Of all numbers in a folder's files, as torch calls them, such as ``bfloat16``; formats of our own left out."""
    entries = (e for file in folder.glob("*.safetensors") for e in read_header(file).entries.values())
    return {str(DTYPES[e.dtype]).removeprefix("torch.") for e in entries if e.dtype in DTYPES}


def _entry(entry: Mapping[str, Any]) -> Entry:
    start, stop = entry["data_offsets"]
    return Entry(entry["dtype"], tuple(entry["shape"]), start, stop - start)


def add_entries(header: Header, added: Mapping[str, Tensor]) -> Header:
    """A header with further tensors; the same one where there are none. added: their shapes and dtypes."""
    if not added:
        return header
    entries = dict(header.entries)
    for name, like in added.items():
        new = Entry(NAMES[like.dtype], tuple(like.shape), 0, like.nbytes)
        entries = _inserted(entries, name, new)
    starts = accumulate((entry.size for entry in entries.values()), initial=0)
    entries = {
        n: Entry(e.dtype, e.shape, start, e.size) for (n, e), start in zip(entries.items(), starts, strict=False)
    }
    head: dict[str, Any] = {} if header.metadata is None else {"__metadata__": header.metadata}
    for name, e in entries.items():
        head[name] = {"dtype": e.dtype, "shape": list(e.shape), "data_offsets": [e.start, e.start + e.size]}
    return Header(_framed(head), header.metadata, entries)


def _inserted(entries: dict[str, Entry], name: str, new: Entry) -> dict[str, Entry]:
    """Behind the last tensor of numbers as wide: writers put the widest first, so all stay aligned."""
    width = _width(new)
    place = max((i for i, entry in enumerate(entries.values(), 1) if _width(entry) >= width), default=0)
    items = list(entries.items())
    return dict([*items[:place], (name, new), *items[place:]])


def _width(entry: Entry) -> int:
    """Bytes of one number; 0 of none."""
    return entry.size // max(prod(entry.shape), 1)
