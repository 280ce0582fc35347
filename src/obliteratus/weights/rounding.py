"""Rounding that keeps an edit: what a grid would round away along some directions is made up for in later rows.

Numbers read from a 4-bit matrix lie on its grid, and an edit moves most of them by less than half a step: rounded to
the nearest, they go back, and the edit with them. Here the sum that each direction sees of a column's rounding errors
is carried on from row to row, as in error diffusion and GPTQ (arXiv:2210.17323, with H = I + λQQᵀ over output rows).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from obliteratus.core.shapes import Float

STEPS = 256  # groups of rows: what one group's own errors leave along Q is then below a sixteenth of σ
RIDGE = 1e-6  # of a direction's length²: only so that the last rows of a direction that is all in others can be solved


def round_compensated(
    weight: Float[Tensor, "out inp"], along: Float[Tensor, "k out"], rounded: Callable[[Tensor], Tensor]
) -> Float[Tensor, "out inp"]:
    """A matrix near ``weight`` whose rounding R has along·R ≈ along·weight. fp32.

    along: orthonormal rows. rounded: rows [n, in] as the format would store them; rows must not depend on each other.
    Rows with little of the directions come first: those with much of them make up for all with the fewest steps.
    """
    order = along.square().sum(0).argsort()
    ahead = along @ along.T  # Gram matrix of the rows not yet rounded
    missed = weight.new_zeros(len(along), weight.shape[1])
    target = weight.clone()
    ridge = RIDGE * torch.eye(len(along)).to(weight)
    for rows in order.split(max(1, len(order) // STEPS)):
        part = along[:, rows]
        target[rows] -= part.T @ torch.linalg.solve(ahead + ridge, missed)
        missed += part @ (rounded(target[rows]) - weight[rows])
        ahead = ahead - part @ part.T
    return target
