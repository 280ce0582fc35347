"""The difference of two plans is that of what they do to a matrix, whatever their bases look like."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.support.plans import PlanMaker
from tests.support.tiny import tiny_subject
from torch import Tensor

from obliteratus.core.types import Edit, Mask, Plan, Shift, Site, Subject
from obliteratus.share.compare_plans import compare_plans, measure_difference

WIDTH = 24


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def basis(k: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(draw(WIDTH, k, seed=seed)).Q.mT.contiguous()


SITE = Site("model.layers.0.mlp.down_proj", 0, "mlp.out", "writes", "linear")


def operator(edit: Edit) -> Tensor:
    """s·BᵀA, written out."""
    return edit.strength * edit.basis.double().mT @ edit.along.double()


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("oblique", [False, True])
def test_it_is_the_distance_of_the_operators(k: int, oblique: bool) -> None:
    """Against the dense matrices, for orthogonal and oblique edits of different strength."""
    first, second = basis(k), basis(k, seed=1)
    covectors = [b + 0.1 * (draw(k, WIDTH, seed=7) @ (torch.eye(WIDTH) - b.mT @ b)) for b in (first, second)]
    then = Edit(SITE, first, 1.0, covectors=covectors[0] if oblique else None)
    now = Edit(SITE, second, 0.7, covectors=covectors[1] if oblique else None)
    dense = float((operator(then) - operator(now)).norm() / operator(then).norm())
    assert measure_difference(then, now) == pytest.approx(dense, rel=1e-9)
    assert dense > 0.5


def test_a_rotation_within_the_subspace_changes_nothing() -> None:
    rows = basis(3)
    turn = torch.linalg.qr(draw(3, 3, seed=5)).Q
    assert measure_difference(Edit(SITE, rows, 1.0), Edit(SITE, turn @ rows, 1.0)) < 1e-6
    assert measure_difference(Edit(SITE, rows, 1.0), Edit(SITE, -rows, 1.0)) < 1e-12


def test_a_small_angle_is_seen_exactly() -> None:
    """‖P − P′‖ ÷ ‖P‖ is √2·sin θ for single directions."""
    first, other = basis(2).double()
    for angle in (1e-6, 1e-3, 0.3):
        now = torch.cos(torch.tensor(angle)) * first + torch.sin(torch.tensor(angle)) * other
        found = measure_difference(Edit(SITE, first[None], 1.0), Edit(SITE, now[None].double(), 1.0))
        assert found == pytest.approx(2**0.5 * torch.sin(torch.tensor(angle)).item(), rel=1e-4)


def test_anchors_count_along_the_directions_alone() -> None:
    rows = basis(1)
    aside = draw(WIDTH, seed=3)
    aside -= rows[0] * (rows[0] @ aside)
    anchor = rows[0] * 2 + aside
    then = Edit(SITE, rows, 1.0, anchor=anchor)
    assert measure_difference(then, replace(then, anchor=anchor + 5 * aside)) < 1e-6
    assert measure_difference(then, replace(then, anchor=anchor + rows[0])) == pytest.approx(0.5, rel=1e-5)
    assert measure_difference(then, replace(then, anchor=None)) == 1.0


def test_masks_and_shifts() -> None:
    mask = Mask(SITE, torch.tensor([1, 2, 3, 4]))
    assert measure_difference(mask, Mask(SITE, torch.tensor([4, 3, 2, 1]))) == 0
    assert measure_difference(mask, Mask(SITE, torch.tensor([1, 2, 3, 5]))) == pytest.approx(2 / 5)
    shift = Shift(SITE, draw(WIDTH))
    assert measure_difference(shift, Shift(SITE, 1.1 * shift.vector)) == pytest.approx(0.1, rel=1e-5)


def change_first(plan: Plan, **values: Any) -> Plan:
    return replace(plan, edits=(replace(plan.edits[0], **values), *plan.edits[1:]))


def test_whole_plans(make_plan: PlanMaker) -> None:
    subject: Subject = tiny_subject("llama")
    plan = make_plan(subject)
    assert compare_plans(plan, Plan(tuple(plan.edits), plan.model)).bitwise
    found = compare_plans(plan, change_first(plan, strength=plan.edits[0].strength + 1e-4))
    assert not found.bitwise
    assert 0 < found.largest < 1e-3
    assert found.where == plan.edits[0].site.parameter
    assert found.is_within(1e-3)
    assert not found.is_within(1e-6)


def test_what_differs_in_kind_is_never_within(make_plan: PlanMaker) -> None:
    subject = tiny_subject("llama")
    plan = make_plan(subject)
    fewer = compare_plans(plan, Plan(plan.edits[1:], plan.model))
    assert "1 of" in fewer.structure
    assert plan.edits[0].site.parameter in fewer.structure
    ruled = compare_plans(plan, change_first(plan, norm="columns"))
    turned = compare_plans(plan, Plan(plan.edits[::-1], plan.model))
    other = compare_plans(plan, Plan(plan.edits, "another"))
    assert "another order" in turned.structure
    assert "another model" in other.structure
    assert not any(one.is_within(10.0) for one in (fewer, ruled, turned, other))
