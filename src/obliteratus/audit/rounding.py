"""What storing a matrix in a format does to it: the size of rounding to a dtype, and the grids of quantized formats."""

from __future__ import annotations

import torch
from torch import Tensor

from obliteratus.core.shapes import Float

# Rounding to the nearest moves a number by half a unit in its last place at most. The excess allows for the base's own
# unit in a value that was rounded up to a power of two.
HALF_UNIT = 0.5005
FORMATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
BLOCK = 32  # numbers that share a scale in GGML's types with one scale; bitsandbytes has 64, k-quants 16 or 32
FOUR_BITS = 16  # different values of a block in 4 bits
LOW_CODES = 32  # codes up to this are tested: bf16 moves them by less than a sixteenth of a step
ON_GRID = 0.8
"""Share of blocks, or mean cosine of the phase, above which numbers are on a grid.

Measured on 35 matrices of the organism astronomy: the cosine is 1.00 after Q8_0 and after int8 in rows, and at most
0.002 before; every matrix was found on a grid after Q8_0, Q4_0 and int8, and none before."""
SAMPLED = 1 << 18  # numbers that grids are looked for in


def unit_of_last_place(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the distance to the next number of a format, fp64, for each value."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(values.abs().double().clamp(min=info.tiny))
    return info.eps * torch.exp2((exponent - 1).double())


def coarsest_unit(values: Tensor, first: torch.dtype, second: torch.dtype) -> Tensor:
    """Return the larger of the units in the last place of two formats, fp64."""
    formats = {dtype for dtype in (first, second) if dtype in FORMATS} or {torch.float32}
    units = [unit_of_last_place(values, dtype) for dtype in formats]
    return units[0] if len(units) == 1 else torch.maximum(*units)


def is_rounding(difference: Tensor, unit: Tensor) -> bool:
    """Return whether no number moved by more than half a unit in the last place."""
    return bool((difference.abs() <= HALF_UNIT * unit).all())


def find_grid(stored: Float[Tensor, "out inp"]) -> str:
    """Return which grid the numbers of a matrix lie on: ``4 bits``, ``8 bits in blocks``, ``8 bits in rows`` or ''.

    Rows are as files have them, so that blocks of one scale are next to each other.
    """
    if stored.shape[1] % BLOCK:
        return ""
    rows = stored[:: max(stored.numel() // SAMPLED, 1)].float()
    blocks = rows.reshape(-1, BLOCK)
    blocks = blocks[blocks.any(1)]
    if not len(blocks):
        return ""
    ordered = blocks.sort(1).values
    different = 1 + (ordered.diff(dim=1) != 0).sum(1)
    if float((different <= FOUR_BITS).float().mean()) > ON_GRID:
        return "4 bits"
    if _phase(blocks, blocks) > ON_GRID:
        return "8 bits in blocks"
    return "8 bits in rows" if _phase(rows, rows) > ON_GRID else ""


def _phase(values: Tensor, group: Tensor) -> float:
    """Return the mean of cos 2π(w ÷ step) over low codes: 1 on the grid of 127 steps up to the largest value."""
    step = group.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
    codes = (values / step).double()
    low = codes.abs() <= LOW_CODES
    low &= codes.abs() > 0.25  # zeros are on every grid
    return float(torch.cos(2 * torch.pi * codes[low]).mean()) if bool(low.any()) else 0.0
