"""Keeps weights on disk and reads them when they are asked for: a block's all at once, while the block before computes.

accelerate's offloading takes its weights from an `OffloadedWeights`, so any code that runs the model finds them. Files
are read into two buffers that are used in turn. Nothing is memory-mapped, so the memory in use is what is asked for.
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
from obliteratus.weights.safetensors_io import TORCH_DTYPES, read_at, tensor_bytes

ALIGNMENT = 64  # bytes, as vector loads want it
CHUNK = 1 << 22  # bytes read at once where numbers are converted: 4 MB stay in the CPU cache until they are cast
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class StoredPiece:
    """A stored tensor and the values of a parameter that it holds."""

    file: Path
    offset: int
    """Bytes from the beginning of the file."""
    dtype: torch.dtype
    start: int
    """Values from the beginning of the parameter."""
    count: int


class OffloadedWeights(Mapping[str, Tensor]):
    """A model's parameters by name, in the model's dtype, each read from its file whenever it is asked for.

    In memory are the parameters of `load_block`, those of `keep_in_memory`, and, once read, all that are not transient.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        like: Mapping[str, Tensor],
        transient: Collection[str],
        aliases: Mapping[str, str],
        device: torch.device,
    ) -> None:
        """like: a tensor of each parameter's shape and dtype. transient: parameters that are dropped after use.
        aliases: tied parameter → the parameter that is stored. device: where blocks compute.

        Raises UserError for a parameter whose stored tensors hold another number of values, or no plain numbers.
        """
        self._descriptors: dict[Path, int] = {}  # first, because __del__ needs it even after an error here
        self.checkpoint, self.device = checkpoint, device
        self._like, self._transient, self._aliases = like, transient, aliases
        self._pieces = {name: _find_pieces(checkpoint, name, like[name]) for name in like if name not in aliases}
        self._block: Tensors = {}
        self._kept: Tensors = {}
        self._finite: set[str] = set()
        self._buffers = [torch.empty(0, dtype=torch.uint8)] * 2
        self._turn = 0
        self._reader = ThreadPoolExecutor(1, "reading weights")
        self._prefetch: tuple[tuple[str, ...], Future[Tensors]] | None = None
        self.bytes_read = 0
        """Bytes read from the files so far."""

    def __getitem__(self, name: str) -> Tensor:
        name = self._aliases.get(name, name)
        for held in (self._block, self._kept):
            if name in held:
                return held[name]
        loaded = self._load([name], torch.empty(self.memory_bytes([name]), dtype=torch.uint8))
        if name not in self._transient:
            self._kept |= loaded
        return loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._like)

    def __len__(self) -> int:
        return len(self._like)

    def memory_bytes(self, names: Sequence[str]) -> int:
        """Return the bytes of memory that the parameters take together."""
        return sum(_aligned_size(self._like[name]) for name in names)

    @property
    def tied(self) -> tuple[str, str] | None:
        """Parameter names of the embedding and of the head that shares its values, or None."""
        return next(((stored, name) for name, stored in self._aliases.items()), None)

    def count(self, name: str) -> int:
        """Return how many values a parameter has."""
        return self._like[name].numel()

    def stored_bytes(self, names: Sequence[str]) -> int:
        """Return the bytes that the parameters take on disk; those of a tied parameter count once."""
        stored = dict.fromkeys(self._aliases.get(name, name) for name in names)
        return sum(p.count * p.dtype.itemsize for name in stored for p in self._pieces[name])

    @contextmanager
    def load_block(self, names: Sequence[str], following: Sequence[str] = ()) -> Iterator[None]:
        """Hold a block's parameters in memory inside the context, and read those of the `following` block meanwhile.

        The buffers are freed when no block follows.
        """
        before = self._block
        self._block = before | self._take(self._stored_names(names))
        if not following:
            self._buffers[1 - self._turn] = torch.empty(0, dtype=torch.uint8)  # frees the previous block's buffer
        else:
            stored = self._stored_names(following)
            self._prefetch = (stored, self._reader.submit(self._load, stored, self._next_buffer(stored)))
        try:
            yield
        finally:
            self._block = before
            if self._prefetch is None:
                self._buffers = [torch.empty(0, dtype=torch.uint8)] * 2

    @contextmanager
    def keep_in_memory(self, names: Sequence[str]) -> Iterator[None]:
        """Hold these parameters in memory inside the context, beside any block."""
        kept = {name: self[name].to(self.device) for name in self._stored_names(names)}
        self._kept |= kept
        try:
            yield
        finally:
            for name in kept:
                del self._kept[name]

    def read_values(self, name: str, indices: Sequence[int]) -> Tensor:
        """Return single values of a flattened parameter in their stored dtype, without reading the rest."""
        return torch.cat([self._read_value(name, index) for index in indices])

    # --------------------------------------------------------------------------------------- reading
    def _stored_names(self, names: Sequence[str]) -> tuple[str, ...]:
        stored = dict.fromkeys(self._aliases.get(name, name) for name in names)
        return tuple(name for name in stored if name not in self._kept)

    def _take(self, names: tuple[str, ...]) -> Tensors:
        """Return the prefetched parameters if they are these, else read these now."""
        prefetch, self._prefetch = self._prefetch, None
        loaded = prefetch[1].result() if prefetch else {}
        if prefetch is None or prefetch[0] != names:
            loaded = self._load(names, self._next_buffer(names))
        return {name: tensor.to(self.device) for name, tensor in loaded.items()}

    def _next_buffer(self, names: Sequence[str]) -> Tensor:
        """Return the buffer that is not in use, made large enough for the parameters and at most twice as large."""
        size, self._turn = self.memory_bytes(names), 1 - self._turn
        if not size <= len(self._buffers[self._turn]) <= 2 * size:
            self._buffers[self._turn] = torch.empty(0, dtype=torch.uint8)  # freed before the new one is allocated
            self._buffers[self._turn] = torch.empty(size, dtype=torch.uint8)
        return self._buffers[self._turn]

    def _load(self, names: Sequence[str], buffer: Tensor) -> Tensors:
        """Read parameters into the buffer and return views of it."""
        starts = accumulate((_aligned_size(self._like[name]) for name in names), initial=0)
        return {name: self._read_parameter(name, buffer[start:]) for name, start in zip(names, starts, strict=False)}

    def _read_parameter(self, name: str, buffer: Tensor) -> Tensor:
        like = self._like[name]
        flat = buffer[: like.nbytes].view(like.dtype)
        for piece in self._pieces[name]:
            self._fill(piece, flat[piece.start : piece.start + piece.count])
        if name not in self._finite and not is_finite(flat):
            raise UserError(f"{self.checkpoint.name}: {name} holds NaN or Inf; download it again, or use another dtype")
        self._finite.add(name)
        return flat.view(like.shape)

    def _fill(self, piece: StoredPiece, values: Tensor) -> None:
        """Read a piece into `values`, which may have another dtype."""
        if piece.dtype == values.dtype:
            self._read(piece.file, piece.offset, values)
            return
        chunk = torch.empty(CHUNK // piece.dtype.itemsize, dtype=piece.dtype)
        for start in range(0, piece.count, len(chunk)):
            stored = chunk[: piece.count - start]
            self._read(piece.file, piece.offset + start * piece.dtype.itemsize, stored)
            values[start : start + len(stored)] = stored

    def _read(self, file: Path, offset: int, into: Tensor) -> None:
        """Fill a flat tensor with the file's bytes. Raises UserError if the file ends too soon."""
        count = read_at(self._descriptor(file), tensor_bytes(into), offset)
        self.bytes_read += count
        if count < into.nbytes:
            raise UserError(f"{file} is truncated: {into.nbytes - count} bytes are missing; download it again")

    def _descriptor(self, file: Path) -> int:
        if file not in self._descriptors:
            self._descriptors[file] = os.open(file, os.O_RDONLY)
        return self._descriptors[file]

    def __del__(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)

    def _read_value(self, name: str, index: int) -> Tensor:
        pieces = self._pieces[self._aliases.get(name, name)]
        piece = next(p for p in pieces if p.start <= index < p.start + p.count)
        value = torch.empty(1, dtype=piece.dtype)
        self._read(piece.file, piece.offset + (index - piece.start) * piece.dtype.itemsize, value)
        return value


def _aligned_size(like: Tensor) -> int:
    return -(-like.nbytes // ALIGNMENT) * ALIGNMENT


def _find_pieces(checkpoint: Checkpoint, name: str, like: Tensor) -> list[StoredPiece]:
    """Return where a parameter's values are stored. Raises UserError if the files store another shape."""
    stored = checkpoint.parameters.get(name)
    keys: Sequence[str] = ()
    if stored is not None:
        keys = (stored.key,) if stored.key else tuple(key for expert in stored.experts for key in expert)
    pieces, start = [], 0
    for key in keys:
        file, offset, entry = checkpoint.locate(key)
        if entry.dtype not in TORCH_DTYPES:
            raise UserError(
                f"{file}: {key} is stored as {entry.dtype}, which is not a plain number format; convert it to BF16"
            )
        pieces.append(StoredPiece(file, offset, TORCH_DTYPES[entry.dtype], start, prod(entry.shape)))
        start += pieces[-1].count
    if start != like.numel():
        raise UserError(
            f"{checkpoint.name}: {name} is stored in another form than the model uses, so it cannot stay on disk; "
            "allow more memory, so that the whole model is loaded"
        )
    return pieces
