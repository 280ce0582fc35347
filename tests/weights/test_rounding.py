"""Rounding that keeps an edit: on a grid coarser than the edit itself, beside rounding to the nearest."""

from __future__ import annotations

import pytest
import torch
from tests.support.plans import random_basis

from obliteratus.weights.rounding import CORRECTED, correct_errors, round_compensated

STEP = 0.5  # half a standard deviation, as between the middle levels of nf4


def grid(rows: torch.Tensor) -> torch.Tensor:
    return (rows / STEP).round() * STEP


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("out", [64, 576])
def test_the_edit_survives_where_the_nearest_takes_it_back(out: int, k: int) -> None:
    draw = torch.Generator().manual_seed(0)
    stored = grid(torch.randn(out, 96, generator=draw))  # what was read from a packed matrix
    q = random_basis(out, k, 1)
    edited = stored - q.T @ (q @ stored)
    size = float((q @ stored).norm())
    nearest, kept = grid(edited), grid(round_compensated(edited, q, grid))
    assert float((q @ nearest).norm()) > 0.2 * size  # the negative control: it is back
    assert float((q @ kept).norm()) < 0.1 * size
    assert float((kept - edited).norm()) < 0.3 * float(edited.norm())  # in steps of half σ, some are needed


def test_on_a_fine_grid_it_is_the_nearest_to_within_a_step() -> None:
    weight, q = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)), random_basis(64, 2, 1)

    def fine(rows: torch.Tensor) -> torch.Tensor:
        return (rows * 4096).round() / 4096

    assert float((fine(round_compensated(weight, q, fine)) - weight).abs().max()) < 4 / 4096


def test_directions_that_miss_some_rows_leave_them_to_the_nearest() -> None:
    weight, q = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)), torch.zeros(1, 64)
    q[0, :8] = 8**-0.5
    made = round_compensated(weight, q, grid)
    assert torch.equal(made[8:], weight[8:])
    assert not torch.equal(made[:8], weight[:8])


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("groups", [7, 16, 256])
def test_it_is_the_formula_step_by_step(k: int, groups: int) -> None:
    """Every group solves for its own share of the error so far; 300 rows do not divide into equal groups."""
    weight, q = torch.randn(300, 32, generator=torch.Generator().manual_seed(0)), random_basis(300, k, 1)
    target, error = weight.double(), torch.zeros(k, 32, dtype=torch.float64)
    along, gram = q.double(), (q @ q.T).double()
    for rows in q.square().sum(0).argsort().split(300 // groups or 1):
        part = along[:, rows]
        target[rows] -= part.T @ torch.linalg.solve(gram + 1e-6 * torch.eye(k).double(), error)
        error += part @ (grid(target[rows]) - weight[rows])
        gram -= part @ part.T
    made = round_compensated(weight, q, grid, groups)
    near = (made - target).abs() < 1e-4
    assert float(near.double().mean()) > 0.995  # the rest follow a number that lay between two steps


# ------------------------------------------------------------------------------------------ fine formats
FINE = 1 / 64  # of σ, as Q8_0's steps


def fine(rows: torch.Tensor) -> torch.Tensor:
    return (rows / FINE).round() * FINE


def correct(edited: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Return the matrix rounded to fine steps, with its strongest rows rounded again."""
    lost = fine(edited) - edited
    correct_errors(lost, q, lambda added, rows: fine(edited[rows] + added) - edited[rows])
    return edited + lost


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("out", [576, 2048])
def test_few_rows_make_up_for_the_errors_of_all(out: int, k: int) -> None:
    stored = fine(torch.randn(out, 96, generator=torch.Generator().manual_seed(0)))
    q = random_basis(out, k, 1)
    edited = stored - q.T @ (q @ stored)
    size, made = float((q @ stored).norm()), correct(edited, q)
    nearest = float((q @ fine(edited)).norm())
    assert nearest > 0.003 * size  # the negative control
    assert float((q @ made).norm()) < 0.35 * nearest
    assert float((made - edited).norm()) < 1.1 * float((fine(edited) - edited).norm())
    weak = q.square().sum(0).argsort()[: out - out // CORRECTED[0]]
    torch.testing.assert_close(made[weak], fine(edited)[weak])


def test_each_correction_is_the_least_change_that_cancels_the_error() -> None:
    """The first round, against the least-squares solution in float64, with steps so fine that rounding adds nothing."""
    lost, q = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)), random_basis(64, 2, 1)
    before, asked = lost.clone(), []

    def round_rows(added: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        asked.append((added, rows))
        return added

    correct_errors(lost, q, round_rows)
    added, rows = asked[0]
    rest = torch.ones(64, dtype=torch.bool).index_fill(0, rows, False)
    error = q.double()[:, rest] @ before.double()[rest]
    expected = -torch.linalg.pinv(q.double()[:, rows]) @ error
    torch.testing.assert_close(added.double(), expected, rtol=1e-3, atol=1e-3)
    assert float((q @ lost).norm()) < 1e-3 * float((q @ before).norm())
