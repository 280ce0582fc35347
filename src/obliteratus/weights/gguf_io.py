"""Reads headers of GGUF files, and rows of their tensors. The gguf package's reader takes seconds for a vocabulary.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from numpy.typing import NDArray

from obliteratus.core.errors import UserError

StoredBytes = NDArray[np.uint8]
"""Rows of a tensor as the file has them, [rows, bytes]."""
MAGIC = b"GGUF"
VERSIONS = (2, 3)  # version 1 counts in 32 bits, and a file of the other byte order shows as a huge number
MAX_DIMENSIONS = 8  # GGML has 4
MAX_STRING = 1 << 24  # bytes: chat templates and vocabularies are far below, so a corrupt length cannot fill memory
ALIGNMENT = 32  # bytes, of the tensor data unless the file says otherwise
PAD = b"\0"
_SCALARS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}


@dataclass(frozen=True)
class GgufTensor:
    """A header's entry for one tensor."""

    name: str
    shape: tuple[int, ...]
    """Rows first, as numpy has it; the file has the reverse."""
    type: GGMLQuantizationType
    start: int = 0
    """Bytes from the beginning of the tensor data."""

    @property
    def size(self) -> int:
        """Bytes of the tensor."""
        return count_bytes(prod(self.shape), self.type)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row, which is the last axis."""
        return count_bytes(self.shape[-1], self.type)


def count_bytes(values: int, kind: GGMLQuantizationType) -> int:
    """Return the bytes that so many values take in a type."""
    block, size = GGML_QUANT_SIZES[kind]
    return values // block * size


@dataclass(frozen=True)
class GgufFile:
    """The header of a GGUF file."""

    path: Path
    version: int
    raw: bytes
    """The bytes of all metadata entries."""
    entries: Mapping[str, tuple[GGUFValueType, int]]
    """Type of each metadata entry, and where its value begins in ``raw``."""
    tensors: Mapping[str, GgufTensor]
    """By name, in the order of the header."""
    data: int
    """Bytes before the tensor data."""

    def value(self, key: str, default: Any = None) -> Any:
        """Return a metadata value, or the default if there is none. Arrays are lists."""
        if key not in self.entries:
            return default
        kind, place = self.entries[key]
        return _Cursor(self.raw, place).read_value(kind)

    @property
    def architecture(self) -> str:
        """Name of the graph that runs the model, such as ``llama``."""
        return str(self.value("general.architecture", ""))

    @cached_property
    def alignment(self) -> int:
        """Bytes that the beginnings of tensors are multiples of."""
        return int(self.value("general.alignment", ALIGNMENT))

    def read_rows(self, tensor: GgufTensor, rows: slice = slice(None)) -> StoredBytes:
        """Return the bytes of some of a tensor's rows, as an array [rows, bytes] that owns its memory."""
        start, stop, _ = rows.indices(prod(tensor.shape[:-1]))
        count = max(stop - start, 0)
        return self._read(tensor, start * tensor.row_bytes, count, tensor.row_bytes)

    def read_bytes(self, tensor: GgufTensor, row: int, start: int, size: int) -> StoredBytes:
        """Return some bytes of one row, as an array [1, size]."""
        return self._read(tensor, row * tensor.row_bytes + start, 1, size)

    def _read(self, tensor: GgufTensor, start: int, count: int, size: int) -> StoredBytes:
        found = np.empty((count, size), np.uint8)
        if not found.size:
            return found
        view, done = found.data.cast("B"), 0
        while done < len(view):
            read = os.preadv(self._descriptor.fileno(), [view[done:]], self.data + tensor.start + start + done)
            if not read:
                raise UserError(f"{self.path} is truncated in {tensor.name}; download it again")
            done += read
        return found

    @cached_property
    def _descriptor(self) -> IO[bytes]:
        return self.path.open("rb", buffering=0)  # closed with the header


def read_gguf(file: Path) -> GgufFile:
    """Read the header of a GGUF file.

    Raises UserError if it is no whole GGUF file, or has a version or a tensor type that is not known here.
    """
    with file.open("rb") as stream:
        if stream.read(4) != MAGIC:
            raise UserError(f"{file} is not a GGUF file; give one, or a folder with safetensors")
        (version,) = struct.unpack("<I", stream.read(4).ljust(4, PAD))
        if version not in VERSIONS and file.stat().st_size >= 24:  # a shorter one is truncated, whatever it says
            raise UserError(f"{file} has GGUF version {version}, and 2 and 3 are read; convert the model again")
        try:
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                header = _parse(file, mapped)
        except (struct.error, ValueError, KeyError, OverflowError, IndexError, MemoryError) as error:
            raise UserError(f"{file} is truncated or corrupt in its header; download it again") from error
    _check_whole(header)
    return header


def _check_whole(header: GgufFile) -> None:
    size = header.path.stat().st_size
    expected = header.data + max((tensor.start + tensor.size for tensor in header.tensors.values()), default=0)
    if size < expected:
        raise UserError(f"{header.path} is truncated: {size} bytes, {expected} expected; download it again")


def _parse(file: Path, mapped: mmap.mmap) -> GgufFile:
    cursor = _Cursor(mapped, 4)
    version, tensors, entries = (cursor.read(form) for form in "IQQ")
    begin, found = cursor.place, dict[str, tuple[GGUFValueType, int]]()
    for _ in range(entries):
        key, kind = cursor.read_string(), GGUFValueType(cursor.read("I"))
        found[key] = kind, cursor.place - begin
        cursor.skip_value(kind)
    raw = mapped[begin : cursor.place]
    listed = [_read_tensor(file, cursor) for _ in range(tensors)]
    header = GgufFile(file, version, raw, found, {tensor.name: tensor for tensor in listed}, 0)
    if header.alignment < 1 or len(header.tensors) < len(listed):
        raise ValueError("no alignment, or two tensors of one name")
    return replace(header, data=-(-cursor.place // header.alignment) * header.alignment)


def _read_tensor(file: Path, cursor: _Cursor) -> GgufTensor:
    name, n = cursor.read_string(), cursor.read("I")
    if not 0 < n <= MAX_DIMENSIONS:
        raise ValueError(f"a tensor of {n} dimensions")
    shape = tuple(cursor.read("Q") for _ in range(n))[::-1]
    number, start = cursor.read("I"), cursor.read("Q")
    try:
        kind = GGMLQuantizationType(number)
    except ValueError as error:
        raise UserError(
            f"{file}: {name} has the unknown type {number}; convert the model to another type, or install a newer gguf"
        ) from error
    return GgufTensor(name, shape, kind, start)


class _Cursor:
    """A place in bytes, from which values are read one after the other."""

    def __init__(self, data: bytes | mmap.mmap, place: int) -> None:
        self.data, self.place = data, place

    def read(self, form: str) -> Any:
        (value,) = struct.unpack_from(f"<{form}", self.data, self.place)  # little-endian, unpadded
        self.place += struct.calcsize(f"<{form}")
        return value

    def read_string(self) -> str:
        length = self.read("Q")
        text = self.data[self.place : self.place + min(length, MAX_STRING)]
        if len(text) != length:
            raise ValueError("a string runs beyond the end of the file")
        self.place += length
        return text.decode("utf-8", errors="surrogateescape")

    def read_value(self, kind: GGUFValueType) -> Any:
        if kind == GGUFValueType.STRING:
            return self.read_string()
        if kind == GGUFValueType.ARRAY:
            item, count = GGUFValueType(self.read("I")), self.read("Q")
            return [self.read_value(item) for _ in range(count)]
        return self.read(_SCALARS[kind])

    def skip_value(self, kind: GGUFValueType) -> None:
        if kind != GGUFValueType.ARRAY:
            self.place += self._skip_string() if kind == GGUFValueType.STRING else _width(kind)
            self._check()
            return
        item, count = GGUFValueType(self.read("I")), self.read("Q")
        if item in _SCALARS:
            self.place += _width(item) * count
            self._check()
            return
        for _ in range(count):
            self.skip_value(item)

    def _skip_string(self) -> int:
        return int.from_bytes(self.data[self.place : self.place + 8], "little") + 8

    def _check(self) -> None:
        if self.place > len(self.data):
            raise ValueError("a value runs beyond the end of the file")


def _width(kind: GGUFValueType) -> int:
    return struct.calcsize(f"<{_SCALARS[kind]}")
