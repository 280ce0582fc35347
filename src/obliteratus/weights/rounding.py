"""Rounds an edited matrix so that quantization does not undo the edit.

Numbers read from a 4-bit matrix lie on its grid, and an edit moves most of them by less than half a step, so rounding
to the nearest level would undo it. `round_compensated` instead carries the rounding errors that each direction sees of
a column on from row to row, as in error diffusion and GPTQ (arXiv:2210.17323, with H = I + λQQᵀ over output rows).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from obliteratus.core.shapes import Float

ROW_GROUPS = 256  # the errors that one group leaves along Q are then below a sixteenth of σ
RIDGE = 1e-6  # relative to a direction's length²; makes the last rows solvable when one direction lies in the others


def round_compensated(
    weight: Float[Tensor, "out inp"],
    along: Float[Tensor, "k out"],
    round_rows: Callable[[Tensor, Tensor], Tensor],
    groups: int = ROW_GROUPS,
) -> Float[Tensor, "out inp"]:
    """Return a matrix near ``weight``, fp32, whose rounding R has along·R ≈ along·weight.

    along: orthonormal rows. round_rows: rows [n, in] and their numbers → the same as the format would store them; rows
    must not depend on each other. groups: how many parts rows are rounded in; a finer format needs fewer. Rows with
    little weight in the directions come first, because those with much of it need the fewest steps to make up for the
    errors of all.
    """
    order = along.square().sum(0).argsort()
    remaining_gram = along @ along.T  # of the rows that are not rounded yet
    error = weight.new_zeros(len(along), weight.shape[1])
    target = weight.clone()
    ridge = RIDGE * torch.eye(len(along)).to(weight)
    for rows in order.split(max(1, len(order) // groups)):
        part = along[:, rows]
        target[rows] -= part.T @ torch.linalg.solve(remaining_gram + ridge, error)
        error += part @ (round_rows(target[rows], rows) - weight[rows])
        remaining_gram = remaining_gram - part @ part.T
    return target
