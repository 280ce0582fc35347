"""Rounds an edited matrix so that quantization does not undo the edit.

Numbers read from a 4-bit matrix lie on its grid, and an edit moves most of them by less than half a step, so rounding
to the nearest level would undo it. `round_compensated` instead carries the rounding errors that each direction sees of
a column on from row to row, as in error diffusion and GPTQ (arXiv:2210.17323, with H = I + λQQᵀ over output rows).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from obliteratus.core.shapes import Float

ROW_GROUPS = 256  # the errors that one group leaves along Q are then below a sixteenth of σ
CORRECTED = (8, 64)
"""Of fine formats: the strongest eighth of rows makes up for the errors of all, then the strongest sixty-fourth for
what is left. With steps of σ / 64, one direction and 576 or 2 048 rows that leaves 0.2 and 0.4 % of what the edit takes
from it, and the nearest numbers 2.0 and 3.8 %."""
RIDGE = 1e-6  # relative to a direction's length²; makes the last rows solvable when one direction lies in the others


def round_compensated(
    weight: Float[Tensor, "out inp"],
    along: Float[Tensor, "k out"],
    round_rows: Callable[[Tensor], Tensor],
    groups: int = ROW_GROUPS,
) -> Float[Tensor, "out inp"]:
    """Return a matrix near ``weight``, fp32, whose rounding R has along·R ≈ along·weight.

    along: orthonormal rows. round_rows: rows [n, in] → the same as the format would store them; rows must not depend on
    each other. groups: how many parts rows are rounded in; a finer format needs fewer.
    """
    target = torch.empty_like(weight)

    def keep(values: Tensor, rows: Tensor) -> Tensor:
        target[rows] = values
        return round_rows(values)

    carry_errors(weight, along, keep, groups)
    return target


def carry_errors(
    weight: Float[Tensor, "out inp"],
    along: Float[Tensor, "k out"],
    round_rows: Callable[[Tensor, Tensor], Tensor],
    groups: int = ROW_GROUPS,
) -> None:
    """Do the same as `round_compensated`, and leave it to ``round_rows`` to keep the rows, whose numbers it gets too.

    Rows with little weight in the directions come first, because those with much of it need the fewest steps to make up
    for the errors of all. A group makes up for its part of the errors so far in the solution of least squares that it
    and all rows after it have for them.
    """
    order = along.square().sum(0).argsort()
    size = max(1, len(order) // groups)
    parts = pad(along[:, order].double(), (0, -len(order) % size)).unflatten(1, (-1, size)).transpose(0, 1)
    remaining = (parts @ parts.mT).flip(0).cumsum(0).flip(0)
    shares = parts.mT @ torch.linalg.inv(remaining + RIDGE * torch.eye(len(along)).to(remaining))
    kept = torch.eye(len(along)).to(remaining) - parts @ shares  # of the error, after a group made up for its share
    error = weight.new_zeros(len(along), weight.shape[1])
    tables = (table.to(weight) for table in (parts, shares, kept))
    for rows, part, share, rest in zip(order.split(size), *tables, strict=True):
        values = weight.index_select(0, rows).addmm_(share[: len(rows)], error, alpha=-1)
        error = torch.addmm(rest @ error, part[:, : len(rows)], round_rows(values, rows) - values)


def correct_errors(
    lost: Float[Tensor, "out inp"],
    along: Float[Tensor, "k out"],
    round_rows: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """Round the strongest rows again, so that what rounding added to a matrix has next to nothing along the directions.

    It suits formats so fine that an edit changes most codes: then a seventh of the numbers can make up for all of them.
    lost: rounded − wanted, changed in place. along: orthonormal rows. round_rows: (additions to the wanted numbers of
    some rows [n, in], their indices) → their new rounded − wanted numbers.
    """
    order = along.square().sum(0).argsort(descending=True)
    for share in CORRECTED:
        rows = order[: max(1, len(order) // share)]
        part = along[:, rows]
        error = along @ lost - part @ lost[rows]
        gram = (part @ part.T).double() + RIDGE * torch.eye(len(along), dtype=torch.float64)
        lost[rows] = round_rows(part.T @ -torch.linalg.solve(gram, error.double()).float(), rows)
