"""A plan as parameters: the same edits, right gradients, and ordinary plans again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.support.tiny import tiny_subject
from tests.support.tuning import KINDS, control_terms, plan_for, train_on_controls

from obliteratus.causal.losses import ReferenceLogits
from obliteratus.core.errors import UserError
from obliteratus.core.types import Edit, Mask, Plan, Prompt, Subject
from obliteratus.excise.bake.tensors import bake
from obliteratus.excise.live.hooks import applied
from obliteratus.inference.chat_template import render_prompts
from obliteratus.tune.parameters import EditParameters


def logits(subject: Subject, plan: Plan) -> torch.Tensor:
    ids = torch.tensor([render_prompts(subject, [Prompt("Tell me about stars?")])[0]])
    with applied(subject, plan), torch.no_grad():
        found: torch.Tensor = subject.model(ids).logits.double()
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_knobs_are_the_plan(kind: str, name: str) -> None:
    """Live with gradients, fixed, and as they came: one map. Another plan is another."""
    subject = tiny_subject(name)
    plan = plan_for(subject, kind)
    parameters = EditParameters(plan, subject.device, "both")
    expected = logits(subject, plan)
    torch.testing.assert_close(logits(subject, parameters.to_live_plan()), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(subject, parameters.to_plan()), expected, rtol=1e-4, atol=1e-5)
    other = logits(subject, plan_for(subject, kind, seed=1))
    assert not torch.allclose(other, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_fitted_is_an_ordinary_plan(kind: str) -> None:
    """After steps along its gradients: orthonormal rows or A Bᵀ = I (but for least change), and it bakes."""
    subject = tiny_subject("llama")
    plan = plan_for(subject, kind)
    parameters = EditParameters(plan, subject.device, "both")
    train_on_controls(subject, parameters, steps=3)
    for before, after in zip(plan.edits, parameters.to_plan().edits, strict=True):
        assert isinstance(before, Edit)
        assert isinstance(after, Edit)
        assert after.basis.shape == before.basis.shape
        assert after.strength != before.strength
        assert not torch.equal(after.basis, before.basis)
        eye = torch.eye(len(after.basis))
        assert torch.allclose(after.along @ after.basis.T, eye, rtol=1e-4, atol=1e-4) == (kind != "least change")
        if kind not in ("oblique", "least change"):
            assert after.covectors is None
    assert bake(subject, parameters.to_plan())


def test_gradients_are_finite_differences() -> None:
    """Of strength and direction, through live edits with an anchor, in a model of float64."""
    subject = tiny_subject("llama")
    subject.model.double()
    plan = plan_for(subject, "anchored")
    pairs = [(render_prompts(subject, [Prompt("Tell me about stars?")])[0], [5, 9, 12, 40, 41, 42])]
    own = ReferenceLogits(subject)

    def loss(parameters: EditParameters) -> torch.Tensor:
        return control_terms(subject, own, parameters.to_live_plan(), pairs).kl

    parameters = EditParameters(plan, subject.device, "both")
    loss(parameters).backward()
    strength, basis = parameters.edits[0].strength, parameters.edits[0].basis
    for x, at in ((strength, ()), (basis, (0, 3))):
        assert x.grad is not None
        ends = []
        for step in (-1e-2, 1e-2):
            with torch.no_grad():
                x[at] += step
                ends.append(float(loss(parameters)))
                x[at] -= step
        assert float(x.grad[at]) == pytest.approx((ends[1] - ends[0]) / 2e-2, rel=0.02, abs=1e-6)


@pytest.mark.parametrize(
    ("what", "turns", "pulls"), [("both", True, True), ("strengths", False, True), ("directions", True, False)]
)
def test_what_is_left_alone_stays(what: Any, turns: bool, pulls: bool) -> None:
    subject = tiny_subject("llama")
    plan = plan_for(subject, "oblique")
    parameters = EditParameters(plan, subject.device, what)
    train_on_controls(subject, parameters, steps=2)
    for before, after in zip(plan.edits, parameters.to_plan().edits, strict=True):
        assert isinstance(before, Edit)
        assert isinstance(after, Edit)
        assert (not torch.allclose(after.basis, before.basis, atol=1e-6)) == turns
        assert (abs(after.strength - before.strength) > 1e-6) == pulls


def test_sparsity_drops_sites() -> None:
    """Only the penalty pulls: strengths fall and sites leave the plan. Without it nothing falls."""
    subject = tiny_subject("llama")
    parameters = EditParameters(plan_for(subject, "orthogonal", strength=0.1), subject.device, "strengths")
    optimizer = torch.optim.Adam(parameters.groups(0.03))
    for _ in range(10):
        optimizer.zero_grad()
        parameters.mean_strength().backward()
        optimizer.step()
    assert len(parameters.to_plan(0.05).edits) < len(parameters.plan.edits) == len(parameters.to_plan().edits)


def test_other_changes_stay() -> None:
    subject = tiny_subject("llama")
    plan = plan_for(subject, "orthogonal")
    mask = Mask(next(s for s in subject.sites if s.part == "mlp.out"), torch.tensor([1, 2]))
    parameters = EditParameters(replace(plan, edits=(mask, *plan.edits)), subject.device, "both")
    assert parameters.to_plan(10.0).edits == (mask,)


def test_norm_rules_are_refused() -> None:
    subject = tiny_subject("llama")
    plan = plan_for(subject, "orthogonal")
    edits = tuple(replace(e, norm="columns") for e in plan.edits if isinstance(e, Edit))
    with pytest.raises(UserError, match="norm rule"):
        EditParameters(replace(plan, edits=edits), subject.device, "both")
