"""The mathematics of an edit against formulas written out anew in float64, and its defining properties."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.plans import random_basis
from torch import Tensor

from obliteratus.core.norms import NormRule
from obliteratus.core.types import Edit, Site
from obliteratus.excise.linear import (
    UNIT_ROWS,
    compute_norm_scales,
    edit_bias,
    edit_weight,
    fold_gain_orthogonal,
    nearest_of_rank,
    project,
    project_matrix,
)

RULES: list[NormRule] = ["none", "columns", "rows", "unit_rows", "unit_rows_rank_3", "whole"]
EXACT: list[NormRule] = ["none", "columns", "whole"]
CASES = given(
    out=st.integers(3, 24),
    inp=st.integers(2, 30),  # a row of one number may nearly vanish, so that fp32 keeps no digit of its length
    k=st.integers(1, 3),
    strength=st.sampled_from([-0.5, 0.0, 0.3, 0.7, 1.0, 1.5, 2.0]),
    seed=st.integers(0, 10_000),
)
FEW = settings(max_examples=40, deadline=None)


def drawn(out: int, inp: int, k: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, inp, generator=generator, dtype=torch.float64)
    return weight, random_basis(out, min(k, out - 1), seed + 1, torch.float64)


def restore_lengths(before: Tensor, after: Tensor, dim: int) -> Tensor:
    """Each column (dim 0) or row at its length before, but for one that keeps less than 1e-3 of it."""
    was, now = before.norm(dim=dim, keepdim=True), after.norm(dim=dim, keepdim=True)
    return after * torch.where(now > 1e-3 * was, was / now, 1.0)


def golden(weight: Tensor, q: Tensor, strength: float, rule: NormRule) -> Tensor:
    """The definition, from the edited matrix itself."""
    if rule in UNIT_ROWS:
        unit = torch.nn.functional.normalize(weight, dim=1)
        kept = restore_lengths(unit, unit - strength * q.T @ (q @ unit), 1)
        change = weight.norm(dim=1, keepdim=True) * kept - weight
        if rule == "unit_rows_rank_3":
            u, sizes, v = torch.linalg.svd(change, full_matrices=False)
            change = u[:, :3] * sizes[:3] @ v[:3]
        return weight + change
    edited = (torch.eye(len(weight)).double() - strength * q.T @ q) @ weight
    if rule == "columns":
        return restore_lengths(weight, edited, 0)
    if rule == "rows":
        return restore_lengths(weight, edited, 1)
    return edited * (weight.norm() / edited.norm()) if rule == "whole" else edited


def test_a_row_that_nearly_vanishes_is_not_rescaled() -> None:
    weight, q = drawn(24, 1, 2, seed=47)
    edited, expected = edit_weight(weight, q, 1.5, "unit_rows"), golden(weight, q, 1.5, "unit_rows")
    torch.testing.assert_close(edited, expected, rtol=1e-5, atol=1e-6)
    left = (edited.abs() < 1e-3 * weight.abs())[:, 0]
    assert int(left.sum()) == 1  # all other rows keep their length
    torch.testing.assert_close(edited.abs()[~left], weight.abs()[~left])


@pytest.mark.parametrize("rule", RULES)
@FEW
@CASES
def test_the_weight_is_its_definition(rule: NormRule, out: int, inp: int, k: int, strength: float, seed: int) -> None:
    weight, q = drawn(out, inp, k, seed)
    expected = golden(weight, q, strength, rule)
    torch.testing.assert_close(edit_weight(weight, q, strength, rule), expected, rtol=1e-5, atol=1e-6)
    single = edit_weight(weight.float(), q.float(), strength, rule).double()
    # In fp32 a squared length is off by some 1e-7 of what it was, so what keeps less than a fiftieth of its length is
    # restored less exactly.
    plain = golden(weight, q, strength, "none")
    well = (expected.abs() <= 50 * plain.abs()) | torch.tensor(rule in UNIT_ROWS)
    torch.testing.assert_close(single[well], expected[well], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("rule", ["none", "columns", "rows", "whole"])
def test_the_factors_are_the_edited_matrix_own(rule: NormRule) -> None:
    weight, q = drawn(12, 20, 2, 0)
    plain = golden(weight, q, 0.7, "none")
    found = compute_norm_scales(project_matrix(weight, q), q, 0.7, rule)
    columns, rows = weight.norm(dim=0) / plain.norm(dim=0), weight.norm(dim=1) / plain.norm(dim=1)
    one = torch.full((12,), float(weight.norm() / plain.norm()), dtype=torch.float64)
    expected = {"none": (None, None), "columns": (columns, None), "rows": (None, rows), "whole": (None, one)}[rule]
    for mine, its in zip((found.inputs, found.outputs), expected, strict=True):
        assert (mine is None) == (its is None)
        if its is not None:
            torch.testing.assert_close(mine, its)


@pytest.mark.parametrize("rule", EXACT)
@FEW
@CASES
def test_removing_is_whole_and_idempotent(
    rule: NormRule, out: int, inp: int, k: int, strength: float, seed: int
) -> None:
    weight, q = drawn(out, inp, k, seed)
    once = edit_weight(weight, q, 1.0, rule)
    assert (q @ once).norm() < 1e-9 * weight.norm()
    torch.testing.assert_close(edit_weight(once, q, 1.0, rule), once)
    torch.testing.assert_close(edit_weight(once, q, strength, rule), once)  # nothing is left to act on


@pytest.mark.parametrize("rule", ["rows", *UNIT_ROWS])
def test_rules_on_rows_are_not_exact(rule: NormRule) -> None:
    weight, q = drawn(12, 20, 2, 0)
    weight *= torch.linspace(0.2, 2.0, 12)[:, None]
    assert (q @ edit_weight(weight, q, 1.0, rule)).norm() > 1e-2 * weight.norm()


def test_unit_rows_keeps_lengths_and_is_not_rows() -> None:
    """Both keep every row's length; the matrices differ by a quarter of the change unless all rows are equally long."""
    weight, q = drawn(40, 60, 1, 0)
    weight *= torch.linspace(0.2, 2.0, 40)[:, None]
    rows, unit = (edit_weight(weight, q, 1.0, rule) for rule in ("rows", "unit_rows"))
    for edited in (rows, unit):
        torch.testing.assert_close(edited.norm(dim=1), weight.norm(dim=1))
    assert (rows - unit).norm() > 0.25 * (rows - weight).norm()
    even = torch.nn.functional.normalize(weight, dim=1)
    torch.testing.assert_close(edit_weight(even, q, 1.0, "rows"), edit_weight(even, q, 1.0, "unit_rows"))


@pytest.mark.parametrize(("out", "inp"), [(40, 60), (60, 40), (2, 9), (9, 2)])
def test_the_change_of_low_rank_is_the_nearest(out: int, inp: int) -> None:
    """Against the singular value decomposition; a matrix of that rank comes back whole."""
    u, sizes, v = torch.linalg.svd(drawn(out, inp, 1, 0)[0], full_matrices=False)
    sizes = 0.7 ** torch.arange(len(sizes), dtype=torch.float64)
    matrix = u * sizes @ v
    left, right = nearest_of_rank(matrix, 3)
    assert left.shape[1] == right.shape[0] == min(3, out, inp)
    torch.testing.assert_close(left @ right, u[:, :3] * sizes[:3] @ v[:3], rtol=1e-5, atol=1e-5)
    assert torch.equal(nearest_of_rank(matrix, 3)[0], left)
    again, other = nearest_of_rank(left @ right, 3)
    torch.testing.assert_close(again @ other, left @ right)


@FEW
@CASES
def test_strengths_on_one_subspace_multiply(out: int, inp: int, k: int, strength: float, seed: int) -> None:
    weight, q = drawn(out, inp, k, seed)
    both = edit_weight(edit_weight(weight, q, strength), q, 0.3)
    torch.testing.assert_close(q @ both, (1 - strength) * 0.7 * (q @ weight))
    assert torch.equal(edit_weight(weight, q, 0.0), weight)
    torch.testing.assert_close(edit_weight(edit_weight(weight, q, 2.0), q, 2.0), weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rule", RULES)
def test_a_column_in_the_subspace_is_not_blown_up(rule: NormRule, dtype: torch.dtype) -> None:
    weight, q = (x.to(dtype) for x in drawn(12, 5, 2, 3))
    weight[:, 2] = 40 * q[0] - 3 * q[1]
    edited = edit_weight(weight, q, 1.0, rule)
    assert torch.isfinite(edited).all()
    if rule in EXACT:
        assert edited[:, 2].norm() < 1e-4 * weight[:, 2].norm()
        assert (q @ edited).norm() < 1e-4 * weight.norm()


def test_a_matrix_in_the_subspace_is_not_blown_up() -> None:
    q = random_basis(12, 2, 0)
    weight = q.T @ torch.randn(2, 7, generator=torch.Generator().manual_seed(0))
    for rule in RULES:
        if rule not in UNIT_ROWS:  # they remove Q from rows of other lengths
            assert edit_weight(weight, q, 1.0, rule).norm() < 1e-3 * weight.norm()


@pytest.mark.parametrize("rule", RULES)
def test_zero_weights_stay_zero(rule: NormRule) -> None:
    weight, q = drawn(6, 4, 2, 0)
    weight[:, 1], weight[2] = 0, 0
    edited = edit_weight(weight, q, 0.7, rule)
    assert torch.isfinite(edited).all()
    assert edited[:, 1].abs().max() < 1e-12
    if rule in UNIT_ROWS:
        assert edited[2].abs().max() < 1e-12


# ------------------------------------------------------------------------------------------------ biases
@FEW
@CASES
def test_the_bias_is_its_definition(out: int, inp: int, k: int, strength: float, seed: int) -> None:
    weight, q = drawn(out, 2, k, seed)
    bias, anchor = weight.T
    p = q.T @ q
    assert edit_bias(None, q, strength, None) is None
    torch.testing.assert_close(edit_bias(bias, q, strength, None), bias - strength * p @ bias)
    torch.testing.assert_close(edit_bias(None, q, strength, anchor), strength * p @ anchor)
    torch.testing.assert_close(edit_bias(bias, q, strength, anchor), bias - strength * p @ (bias - anchor))
    torch.testing.assert_close(edit_bias(bias, q, strength, bias), bias)


@FEW
@CASES
def test_project_is_the_same_edit_on_vectors(out: int, inp: int, k: int, strength: float, seed: int) -> None:
    weight, q = drawn(out, inp, k, seed)
    torch.testing.assert_close(project(weight.T, q, strength).T, edit_weight(weight, q, strength))


# ------------------------------------------------------------------------------------------------- gains
@FEW
@given(width=st.integers(4, 30), k=st.integers(1, 3), seed=st.integers(0, 1000))
def test_through_a_gain(width: int, k: int, seed: int) -> None:
    q = random_basis(width, k, seed, torch.float64)
    generator = torch.Generator().manual_seed(seed)
    gain = 0.2 + torch.rand(width, generator=generator, dtype=torch.float64)
    gain *= torch.randint(0, 2, (width,), generator=generator) * 2 - 1  # gains can be negative
    folded = fold_gain_orthogonal(q, gain)
    torch.testing.assert_close(folded @ folded.T, torch.eye(k).double())
    values = project(torch.randn(5, width, generator=generator, dtype=torch.float64), folded, 1.0)
    assert ((values * gain) @ q.T).abs().max() < 1e-9
    naive = project(torch.randn(5, width, generator=generator, dtype=torch.float64), q, 1.0)
    assert ((naive * gain) @ q.T).abs().max() > 1e-4  # negative control: the gain forgotten


# ---------------------------------------------------------------------------------- the tests' own checks
def test_shapes_are_checked_at_run_time() -> None:
    weight, q = drawn(6, 4, 2, 0)
    with pytest.raises(Exception, match="Type-check error"):
        edit_weight(weight.T, q, 1.0)
    with pytest.raises(Exception, match="Type-check error"):
        Edit(Site("a", 0, "attn.out", "writes", "linear"), q[0], 1.0)
