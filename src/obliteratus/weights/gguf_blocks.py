"""Numbers of GGUF tensors ↔ matrices, in every type that the gguf package reads.

GGML's types keep blocks of 32 or 256 numbers as w = step · code + base. An edit here keeps steps and bases and rounds
to new codes: numbers that an edit leaves alone keep every bit, and k-quants, which the gguf package cannot quantize to,
stay what they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import gguf
import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from obliteratus.core.shapes import Float
from obliteratus.weights.gguf_io import StoredBytes

T = GGMLQuantizationType


class CodeBits(NamedTuple):
    """Where in a block some bits of the codes are."""

    start: int
    """First byte."""
    shift: int
    """The lowest of these bits in the code."""
    bits: int
    group: int
    """Bytes in a row that hold codes in a row; the codes in a byte's next bits are so far away."""


# As ggml-common.h and the gguf package's quants.py have them.
CODES: Mapping[T, tuple[CodeBits, ...]] = {
    T.Q4_0: (CodeBits(2, 0, 4, 16),),
    T.Q4_1: (CodeBits(4, 0, 4, 16),),
    T.Q5_0: (CodeBits(2, 4, 1, 1), CodeBits(6, 0, 4, 16)),
    T.Q5_1: (CodeBits(4, 4, 1, 1), CodeBits(8, 0, 4, 16)),
    T.Q8_0: (CodeBits(2, 0, 8, 32),),
    T.Q2_K: (CodeBits(16, 0, 2, 32),),
    T.Q3_K: (CodeBits(0, 2, 1, 32), CodeBits(32, 0, 2, 32)),
    T.Q4_K: (CodeBits(16, 0, 4, 32),),
    T.Q5_K: (CodeBits(16, 4, 1, 32), CodeBits(48, 0, 4, 32)),
    T.Q6_K: (CodeBits(0, 0, 4, 64), CodeBits(128, 4, 2, 32)),
}
# Of types with one step for a block, at its beginning: the code of zero, or None if the block's least number follows.
ZERO_CODES: Mapping[T, int | None] = {T.Q4_0: 8, T.Q4_1: None, T.Q5_0: 16, T.Q5_1: None, T.Q8_0: 128}
SIGN = 128  # Q8_0 has signed codes; with this bit turned over they count from 0
FLOATS: Mapping[T, torch.dtype] = {T.F32: torch.float32, T.F16: torch.float16, T.BF16: torch.bfloat16}
# Types that the gguf package quantizes to, by their size, for edited tensors of a type that cannot be written again.
LARGER = (T.Q4_0, T.Q5_0, T.Q8_0, T.F16)
MARGIN = 0.5  # bits a number: at equal size these types round more than those they stand in for


def count_levels(kind: T) -> int:
    """Return how many codes a type has; 0 if its numbers are no multiples of a step."""
    return 1 << sum(part.bits for part in CODES[kind]) if kind in CODES else 0


def bits_of(kind: T) -> float:
    """Return the bits that a number takes, with its share of the block's steps."""
    block, size = GGML_QUANT_SIZES[kind]
    return 8 * size / block


def choose_written_type(kind: T) -> T:
    """Return the type that edited numbers of a type are written in: itself where possible, else the next larger one."""
    if kind in CODES or kind in FLOATS or _can_quantize(kind):
        return kind
    return next(larger for larger in LARGER if bits_of(larger) >= min(bits_of(kind) + MARGIN, bits_of(T.F16)))


def _can_quantize(kind: T) -> bool:
    try:
        gguf.quantize(np.zeros((1, GGML_QUANT_SIZES[kind][0]), np.float32), kind)
    except NotImplementedError:
        return False
    return True


def can_read(kind: T) -> bool:
    """Return whether the numbers of a type can be read."""
    try:
        decode(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def decode(stored: StoredBytes, kind: T) -> Float[Tensor, "rows n"]:
    """Return the numbers of rows of bytes [rows, bytes], fp32. Raises NotImplementedError for types unknown to gguf."""
    if kind in FLOATS:
        return torch.from_numpy(stored).view(FLOATS[kind]).float()
    if kind == T.Q8_0:  # thirty times as fast as the package
        blocks = torch.from_numpy(_by_block(stored, kind))
        steps = blocks[:, :2].contiguous().view(torch.float16)
        return blocks[:, 2:].view(torch.int8).float().mul_(steps).view(len(stored), -1)
    return torch.from_numpy(gguf.dequantize(stored, kind))


def encode(values: Float[Tensor, "rows n"], kind: T) -> StoredBytes:
    """Return rows of bytes with new steps, as the gguf package rounds them."""
    if kind in FLOATS:
        return values.to(FLOATS[kind]).contiguous().view(torch.uint8).numpy()
    return np.asarray(gguf.quantize(np.ascontiguousarray(values.numpy()), kind))


# ------------------------------------------------------------------------------------- steps and codes
@dataclass(frozen=True)
class Grid:
    """The numbers that rows can hold if their steps stay: step · code + base. Both are shared by neighbors in a row."""

    step: Float[Tensor, "rows parts 1"]
    base: Float[Tensor, "rows parts 1"]
    inverse: Float[Tensor, "rows parts 1"]
    """1 / step, and 0 where the step is 0."""
    offset: Float[Tensor, "rows parts 1"]
    """−base / step: code = number / step + offset, rounded."""
    levels: int

    def codes(self, values: Float[Tensor, "rows n"]) -> Float[Tensor, "rows n"]:
        """Return the nearest codes, as whole fp32 numbers."""
        # A product and a sum: torch's addcmul takes three times as long where a factor is shared.
        codes = (self._by_part(values) * self.inverse).add_(self.offset)
        return codes.round_().clamp_(0, self.levels - 1).view(values.shape)

    def missed(self, values: Float[Tensor, "rows n"]) -> float:
        """Return the squared distance by which numbers lie beyond the first and the last code."""
        ends = torch.stack([self.base, self.base + (self.levels - 1) * self.step])
        parts = self._by_part(values)
        beyond = parts - parts.clamp(ends.amin(0), ends.amax(0))
        return float(torch.linalg.vector_norm(beyond)) ** 2

    def values(self, codes: Float[Tensor, "rows n"]) -> Float[Tensor, "rows n"]:
        """Return the numbers of codes."""
        return (self._by_part(codes) * self.step).add_(self.base).view(codes.shape)

    def select(self, rows: Tensor) -> Grid:
        """Return the grid of some rows."""
        return self._map(lambda numbers: numbers.index_select(0, rows))

    def transpose(self, n: int) -> Grid:
        """Return the grid of the transposed matrix, of n rows, where each number has its own step."""
        part = torch.arange(n) // (n // self.step.shape[1])
        return self._map(lambda numbers: numbers.transpose(0, 1)[part])

    def _map(self, change: Callable[[Tensor], Tensor]) -> Grid:
        return Grid(change(self.step), change(self.base), change(self.inverse), change(self.offset), self.levels)

    def _by_part(self, values: Tensor) -> Tensor:
        return values.reshape(*self.step.shape[:2], -1)


def make_grid(step: Float[Tensor, "rows parts"], base: Float[Tensor, "rows parts"], levels: int) -> Grid:
    """Return the grid of these steps and least numbers."""
    step, base = step[..., None], base[..., None]
    inverse = torch.where(step == 0, 0.0, 1 / step)
    return Grid(step, base, inverse, -base * inverse, levels)


def read_grid(stored: StoredBytes, kind: T) -> Grid:
    """Return the steps and bases of rows of bytes in a type of `CODES`."""
    levels = count_levels(kind)
    if kind in ZERO_CODES:
        head = torch.from_numpy(_by_block(stored, kind)[:, :4].copy()).view(torch.float16).float()
        head = head.view(len(stored), -1, 2)
        zero = ZERO_CODES[kind]
        return make_grid(head[..., 0], head[..., 1] if zero is None else -zero * head[..., 0], levels)
    # k-quants have a step for 16 or 32 numbers: the package reads what their blocks would hold at code 0 and at code 1.
    zeros, ones = (_sample_parts(stored, kind, code) for code in (0, 1))
    return make_grid(ones - zeros, zeros, levels)


PART = 16  # numbers that share a step in every k-quant


def _sample_parts(stored: StoredBytes, kind: T, code: int) -> Float[Tensor, "rows parts"]:
    codes = torch.full((len(stored), _count_values(stored, kind)), float(code))
    values = gguf.dequantize(write_codes(stored, codes, kind), kind)
    return torch.from_numpy(values[:, ::PART].copy())


def write_codes(stored: StoredBytes, codes: Tensor, kind: T) -> StoredBytes:
    """Return rows of bytes with the steps of ``stored`` and these codes [rows, n]."""
    blocks = _by_block(stored, kind).copy()
    flat = (
        codes.numpy().astype(np.uint8, copy=False).reshape(len(blocks), -1)
    )  # torch's own cast takes five times as long
    for part in CODES[kind]:
        if part.bits == 8:
            np.bitwise_xor(flat, SIGN, out=blocks[:, part.start :])
            continue
        parts = ((flat >> part.shift) & ((1 << part.bits) - 1)).reshape(len(blocks), -1, 8 // part.bits, part.group)
        packed = parts[:, :, 0].copy()
        for i in range(1, 8 // part.bits):
            packed |= parts[:, :, i] << (part.bits * i)
        packed = packed.reshape(len(blocks), -1)
        blocks[:, part.start : part.start + packed.shape[1]] = packed
    return blocks.reshape(stored.shape)


def _by_block(stored: StoredBytes, kind: T) -> StoredBytes:
    return stored.reshape(-1, GGML_QUANT_SIZES[kind][1])


def _count_values(stored: StoredBytes, kind: T) -> int:
    block, size = GGML_QUANT_SIZES[kind]
    return int(stored.shape[1]) // size * block
