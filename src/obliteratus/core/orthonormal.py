"""Orthonormal rows: Gram–Schmidt that keeps the order and signs of rows, and finds those that depend on others."""

from __future__ import annotations

import torch
from torch import Tensor

from obliteratus.core.shapes import Float

# A unit row that keeps less than this length after a projection is rounding, not a direction.
MIN_ROW_NORM = 1e-3


def orthonormalize(rows: Float[Tensor, "streams k width"]) -> Float[Tensor, "streams k width"]:
    """Apply Gram–Schmidt, keeping row order and signs; rows that are (nearly) zero or dependent become zeros.

    QR is not used because it replaces a dependent row by some other unit vector, and removes that from all later rows.
    Lengths matter: pass unit rows, or what is left of unit rows after a projection.
    """
    result = torch.zeros_like(rows)
    for i in range(rows.shape[1]):
        row = rows[:, i]
        for _ in range(2):  # the second round removes what rounding left of the first
            row = row - torch.einsum("lk,lkw->lw", torch.einsum("lkw,lw->lk", result, row), result)
        length = row.norm(dim=1, keepdim=True)
        result[:, i] = torch.where(length > MIN_ROW_NORM, row / length.clamp(min=MIN_ROW_NORM), torch.zeros_like(row))
    return result
