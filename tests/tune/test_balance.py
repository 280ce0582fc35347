"""Balanced strengths: gain and cost as measured by small changes, the cheapest combination, and what gains nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.support.refuser import REFUSAL
from tests.support.tiny import tiny_subject
from tests.support.tuning import plan_for, prompt_pairs, random_upper_plan
from tests.tune.test_fit import MEMORY, SETTINGS, fit_from, refusing, weak

from obliteratus.core.types import Edit, Plan
from obliteratus.excise.live.hooks import applied
from obliteratus.tune.balance import balance_strengths, estimate_fisher, measure_gain, solve_nonnegative
from obliteratus.tune.objective import ZERO_LOSS
from obliteratus.tune.parameters import EditParameters
from obliteratus.tune.targets import TrainingPairs
from obliteratus.tune.tuning_data import TuningData

N = 12


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


# ---------------------------------------------------------------------------------------------- the solution
def test_without_bounds_that_hold_it_is_newtons_step() -> None:
    """Golden: the linear system, where its solution is positive."""
    root = 0.1 * draw(N, N)
    matrix = root @ root.T + torch.eye(N, dtype=torch.float64)
    wanted = draw(N).abs() + 0.1
    found = solve_nonnegative(matrix, matrix @ wanted)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_bounds_hold_and_no_smaller_value_is_near() -> None:
    """The conditions of Karush, Kuhn and Tucker: no slope at positive entries, none that would lower it at zeros."""
    root = draw(N, N)
    matrix, gradient = root @ root.T + torch.eye(N, dtype=torch.float64), draw(N)
    found = solve_nonnegative(matrix, gradient)
    slope = matrix @ found - gradient
    assert found.min() == 0 < found.max()
    assert slope[found > 0].abs().max() < 1e-4
    assert slope[found == 0].min() > -1e-4


# ------------------------------------------------------------------------------------------- gain and cost
def make_data(repeats: int = 1) -> tuple[TuningData, EditParameters]:
    """A tiny Llama with random edits, and answers to fit to."""
    subject = tiny_subject("llama")
    pairs = prompt_pairs(subject, 6)
    train = TrainingPairs(pairs[:3] * repeats, pairs[3:])
    data = TuningData(subject, train, TrainingPairs([], []), SETTINGS, MEMORY)
    return data, EditParameters(random_upper_plan(subject, plan_for, kind="oblique"), subject.device, "strengths")


def at_strengths(parameters: EditParameters, strengths: torch.Tensor) -> Plan:
    edits = [p.to_edit() for p in parameters.edits]
    scaled = [replace(e, strength=float(s)) for e, s in zip(edits, strengths, strict=True)]
    return replace(parameters.plan, edits=tuple(scaled))


def zero(parameters: EditParameters) -> list[torch.Tensor]:
    with torch.no_grad():
        for p in parameters.edits:
            p.strength.zero_()
    return [p.strength for p in parameters.edits]


def test_the_gain_is_the_slope_of_the_hinge_loss() -> None:
    """Golden: central differences of the loss itself."""
    data, parameters = make_data()
    loss, gain = measure_gain(data, parameters, zero(parameters))
    values = []
    for sign in (1, -1, 0):
        plan = at_strengths(parameters, sign * 0.01 * torch.ones(len(gain)))
        pairs = TrainingPairs([], data.train.target)
        with torch.no_grad():
            values.append(float(sum(data.iterate_losses(plan, pairs, SETTINGS.margin), ZERO_LOSS).hinge))
    assert loss == pytest.approx(values[2], rel=1e-4)
    assert float(gain.sum()) == pytest.approx((values[1] - values[0]) / 0.02, rel=0.02)


def test_the_fisher_information_foretells_the_kl_of_small_edits() -> None:
    """Golden: KL of first and of all tokens as the control loss has it, under weak edits of two kinds."""
    data, parameters = make_data(repeats=40)
    fisher = estimate_fisher(data, parameters, zero(parameters))
    n = len(fisher)
    one = torch.zeros(n, dtype=torch.float64)
    one[0] = 0.05
    for strengths in (one, torch.full((n,), 0.03, dtype=torch.float64)):
        plan, total = at_strengths(parameters, strengths), 0.0
        with torch.no_grad():
            for part in data.iterate_losses(plan, TrainingPairs(data.train.control[:3], []), 0.0):
                total += float(part.kl)
        assert float(strengths @ fisher @ strengths) / 2 == pytest.approx(total, rel=0.3)


# ------------------------------------------------------------------------------------------ on the refuser
def test_only_what_weakens_the_behavior_is_edited() -> None:
    """Of two edits one removes the refusal; the other removes a random axis, and gets no strength."""
    plan, other = weak(refusing(), REFUSAL), weak(refusing(), 9)
    fit = fit_from(replace(plan, edits=(*plan.edits, *other.edits)), what="strengths")
    assert balance_strengths(fit.data, fit.parameters) is not None
    first, second = (float(p.strength.detach()) for p in fit.parameters.edits)
    assert first > 0.3
    assert second < 0.05 * first


def test_where_no_edit_weakens_it_strengths_stay() -> None:
    """An edit that adds to the refusal: less than none of it would help, and that is no removal."""
    plan = weak(refusing(), REFUSAL)
    turned = replace(plan.edits[0], covectors=-plan.edits[0].along)  # type: ignore[union-attr, type-var]
    fit = fit_from(replace(plan, edits=(turned,)), what="strengths")
    assert balance_strengths(fit.data, fit.parameters) is None
    assert float(fit.parameters.edits[0].strength.detach()) == pytest.approx(0.3)


def test_strengths_rise_until_the_judge_finds_the_goal_reached() -> None:
    fit = fit_from(weak(refusing(), REFUSAL), SETTINGS.model_copy(update={"steps": 0}), what="strengths")
    points = [*fit.balance(), *fit.take_steps()]
    assert points[-1].checked.rate == 0
    assert all(point.checked.rate > 0 for point in points[:-1])
    assert len(fit.take_steps()) == 1  # no gradient step is taken


def test_live_strengths_are_those_of_the_plan() -> None:
    """What was set is what a plan holds: the edited model's logits are the same."""
    data, parameters = make_data()
    balance_strengths(data, parameters)
    plan = parameters.to_plan()
    with torch.no_grad():
        with applied(data.subject, parameters.to_live_plan()):
            live = data.cached.logp(data.train.control)
        with applied(data.subject, plan):
            saved = data.cached.logp(data.train.control)
    torch.testing.assert_close(live, saved)
    assert all(isinstance(e, Edit) for e in plan.edits)
