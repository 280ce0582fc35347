"""Weights that stay on disk: a tensor is read when it is asked for; a block's all at once, while the block before it
computes.

A `OffloadedWeights` is what accelerate's offloading takes its weights from, so whatever runs the model finds them. Files are read
with plain reads into two buffers that are used in turn: nothing is mapped, and no more is held than is said.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from obliteratus.core.errors import UserError
from obliteratus.weights.checkpoint import Checkpoint
from obliteratus.weights.finite import is_finite
from obliteratus.weights.safetensors_io import DTYPES, read_fully, tensor_bytes

ALIGNED = 64  # bytes: where vector loads begin
CHUNK = 1 << 22  # bytes read at once where numbers are converted: 4 MB stay in the cache between reading and casting
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class StoredPiece:
    """A stored tensor, and which values of a parameter it holds."""

    file: Path
    offset: int
    """Bytes from the beginning of the file."""
    dtype: torch.dtype
    start: int
    """Values from the beginning of the parameter."""
    count: int


class OffloadedWeights(Mapping[str, Tensor]):
    """A model's parameters by name, in the model's dtype, each read from its file whenever it is asked for.

    What is `holding`, and what lies outside the blocks and is no table, stays in memory once it was read.
    """

    def __init__(
        self,
        files: Checkpoint,
        like: Mapping[str, Tensor],
        passing: Collection[str],
        aliases: Mapping[str, str],
        device: torch.device,
    ) -> None:
        """like: shape and dtype of each parameter. passing: those that are dropped after their use. aliases: tied
        parameters, by name the one that is stored. UserError where one cannot be read by itself."""
        self._open: dict[Path, int] = {}
        self.files, self.device, self._like, self._passes, self._alias = files, device, like, passing, aliases
        self._pieces = {name: _pieces(files, name, like[name]) for name in like if name not in aliases}
        self._held: Tensors = {}
        self._kept: Tensors = {}
        self._finite: set[str] = set()
        self._buffers = [torch.empty(0, dtype=torch.uint8)] * 2
        self._turn = 0
        self._reader = ThreadPoolExecutor(1, "reading weights")
        self._coming: tuple[tuple[str, ...], Future[Tensors]] | None = None
        self.bytes_read = 0
        """Of the files, so far."""

    def __getitem__(self, name: str) -> Tensor:
        name = self._alias.get(name, name)
        for there in (self._held, self._kept):
            if name in there:
                return there[name]
        found = self._load([name], torch.empty(self.bytes_of([name]), dtype=torch.uint8))
        if name not in self._passes:
            self._kept |= found
        return found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._like)

    def __len__(self) -> int:
        return len(self._like)

    def bytes_of(self, names: Sequence[str]) -> int:
        """Memory that these take together."""
        return sum(_room(self._like[name]) for name in names)

    @property
    def tied(self) -> tuple[str, str] | None:
        """Names of the embedding and of the head that shares its numbers."""
        return next(((stored, name) for name, stored in self._alias.items()), None)

    def count(self, name: str) -> int:
        """How many values a parameter has."""
        return self._like[name].numel()

    def stored_bytes(self, names: Sequence[str]) -> int:
        """Bytes of them on disk."""
        stored = dict.fromkeys(self._alias.get(name, name) for name in names)
        return sum(p.count * p.dtype.itemsize for name in stored for p in self._pieces[name])

    @contextmanager
    def holding(self, names: Sequence[str], then: Sequence[str] = ()) -> Iterator[None]:
        """Inside, these are in memory, and what comes ``then`` is being read. Nothing is left once nothing comes."""
        before = self._held
        self._held = before | self._arrived(self._own(names))
        if not then:
            self._buffers[1 - self._turn] = torch.empty(0, dtype=torch.uint8)  # nobody needs what was there before
        else:
            following = self._own(then)
            self._coming = (following, self._reader.submit(self._load, following, self._buffer(following)))
        try:
            yield
        finally:
            self._held = before
            if self._coming is None:
                self._buffers = [torch.empty(0, dtype=torch.uint8)] * 2

    @contextmanager
    def keeping(self, names: Sequence[str]) -> Iterator[None]:
        """Inside, these are in memory, beside what is held."""
        found = {name: self[name].to(self.device) for name in self._own(names)}
        self._kept |= found
        try:
            yield
        finally:
            for name in found:
                del self._kept[name]

    def picked(self, name: str, at: Sequence[int]) -> Tensor:
        """Single values of a parameter, as they are stored: of a file's pages, few are read."""
        return torch.cat([self._value(name, index) for index in at])

    # --------------------------------------------------------------------------------------- reading
    def _own(self, names: Sequence[str]) -> tuple[str, ...]:
        stored = dict.fromkeys(self._alias.get(name, name) for name in names)
        return tuple(name for name in stored if name not in self._kept)

    def _arrived(self, names: tuple[str, ...]) -> Tensors:
        """What was asked for ahead, or else what is read now."""
        coming, self._coming = self._coming, None
        found = coming[1].result() if coming else {}
        if coming is None or coming[0] != names:
            found = self._load(names, self._buffer(names))
        return {name: tensor.to(self.device) for name, tensor in found.items()}

    def _buffer(self, names: Sequence[str]) -> Tensor:
        """The one of the two that is not in use, of at least that size, and at most twice as large."""
        size, self._turn = self.bytes_of(names), 1 - self._turn
        if not size <= len(self._buffers[self._turn]) <= 2 * size:
            self._buffers[self._turn] = torch.empty(0, dtype=torch.uint8)  # goes before the new one comes
            self._buffers[self._turn] = torch.empty(size, dtype=torch.uint8)
        return self._buffers[self._turn]

    def _load(self, names: Sequence[str], buffer: Tensor) -> Tensors:
        """Read parameters into the buffer: tensors are views of it."""
        starts = accumulate((_room(self._like[name]) for name in names), initial=0)
        return {name: self._parameter(name, buffer[start:]) for name, start in zip(names, starts, strict=False)}

    def _parameter(self, name: str, room: Tensor) -> Tensor:
        like = self._like[name]
        flat = room[: like.nbytes].view(like.dtype)
        for piece in self._pieces[name]:
            self._fill(piece, flat[piece.start : piece.start + piece.count])
        if name not in self._finite and not is_finite(flat):
            raise UserError(f"{self.files.name}: {name} holds NaN or Inf; download it again, or use another dtype")
        self._finite.add(name)
        return flat.view(like.shape)

    def _fill(self, piece: StoredPiece, values: Tensor) -> None:
        if piece.dtype == values.dtype:
            self._read(piece.file, piece.offset, values)
            return
        stored = torch.empty(CHUNK // piece.dtype.itemsize, dtype=piece.dtype)
        for part in range(0, piece.count, len(stored)):
            here = stored[: piece.count - part]
            self._read(piece.file, piece.offset + part * piece.dtype.itemsize, here)
            values[part : part + len(here)] = here

    def _read(self, file: Path, offset: int, into: Tensor) -> None:
        """Fill a flat tensor with the file's bytes. UserError where it ends too soon, as one cut short while it is
        in use."""
        got = read_fully(self._descriptor(file), tensor_bytes(into), offset)
        self.bytes_read += got
        if got < into.nbytes:
            raise UserError(f"{file} is truncated: {into.nbytes - got} bytes are missing; download it again")

    def _descriptor(self, file: Path) -> int:
        if file not in self._open:
            self._open[file] = os.open(file, os.O_RDONLY)
        return self._open[file]

    def __del__(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)

    def _value(self, name: str, index: int) -> Tensor:
        own = self._pieces[self._alias.get(name, name)]
        piece = next(p for p in own if p.start <= index < p.start + p.count)
        one = torch.empty(1, dtype=piece.dtype)
        self._read(piece.file, piece.offset + (index - piece.start) * piece.dtype.itemsize, one)
        return one


def _room(like: Tensor) -> int:
    return -(-like.nbytes // ALIGNED) * ALIGNED


def _pieces(files: Checkpoint, name: str, like: Tensor) -> list[StoredPiece]:
    """Where a parameter's values are. UserError where they are stored in another form than its own."""
    found = files.where.get(name)
    keys = () if found is None else (found.key,) if found.key else tuple(k for own in found.experts for k in own)
    pieces, start = [], 0
    for key in keys:
        file, offset, entry = files.place(key)
        if entry.dtype not in DTYPES:
            raise UserError(f"{file}: {key} is stored as {entry.dtype}, which is no plain number; convert it to BF16")
        pieces.append(StoredPiece(file, offset, DTYPES[entry.dtype], start, prod(entry.shape)))
        start += pieces[-1].count
    if start != like.numel():
        raise UserError(
            f"{files.name}: {name} is stored in another form than it is used in, so it cannot stay on disk; "
            "allow more memory, so that the whole model is loaded"
        )
    return pieces
