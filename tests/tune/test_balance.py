"""Balanced strengths: gain and cost as measured by small changes, the cheapest combination, and what gains nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from tests.support.refuser import REFUSAL, asked, byte
from tests.support.tiny import tiny_subject
from tests.support.tuning import plan_for, prompt_pairs, random_upper_plan
from tests.tune.test_fit import refusing, weak
from torch.nn import functional as F

from obliteratus.core.settings import Tune
from obliteratus.core.types import Edit, Plan, PromptSet, Splits
from obliteratus.excise.live.hooks import applied
from obliteratus.judge.judge import Judge
from obliteratus.tune.balance import (
    MARGIN,
    BalanceData,
    balance_plan,
    collect_balance_data,
    estimate_fisher,
    measure_gain,
    solve_nonnegative,
)
from obliteratus.tune.fit import tune_plan
from obliteratus.tune.parameters import EditParameters
from obliteratus.tune.search_check import SearchCheck
from obliteratus.tune.tuning_data import CachedPairs
from obliteratus.tune.weakest import FACTOR, find_weakest
from obliteratus.verify.openings import log_odds

N = 12
OPENING = [7]  # a token of the tiny models, taken for a refusal's first
SETTINGS = Tune(balance=True, what="strengths", steps=0, tokens=6, prompts=8, watch=0)


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
def make_data(repeats: int = 1) -> tuple[BalanceData, EditParameters]:
    """A tiny Llama with random edits at strength 0, with prompts and answers."""
    subject = tiny_subject("llama")
    pairs = prompt_pairs(subject, 6)
    target, control = pairs[3:], pairs[:3] * repeats
    losses = [lambda logp: log_odds(logp, OPENING).sum()]
    first = [(row, answer[:1]) for row, answer in target]
    data = BalanceData(subject, CachedPairs(subject, [*first, *control]), first, control, losses)
    parameters = EditParameters(random_upper_plan(subject, plan_for, kind="oblique"), subject.device, "strengths")
    parameters.scale(0.0)
    return data, parameters


def at_strengths(parameters: EditParameters, strengths: Sequence[float] | torch.Tensor) -> Plan:
    edits = [replace(p.to_edit(), strength=float(s)) for p, s in zip(parameters.edits, strengths, strict=True)]
    return replace(parameters.plan, edits=tuple(edits))


@torch.no_grad()
def logp_under(data: BalanceData, plan: Plan, pairs: Sequence[tuple[list[int], list[int]]]) -> torch.Tensor:
    with applied(data.subject, plan):
        return data.cached.logp(pairs).double()


def test_the_gain_is_the_slope_of_the_log_odds() -> None:
    """Golden: central differences of the log-odds themselves."""
    data, parameters = make_data()
    left, gain = measure_gain(data, parameters)
    ends = [
        float(log_odds(logp_under(data, at_strengths(parameters, [s] * len(gain)), data.target), OPENING).mean())
        for s in (0.01, -0.01, 0.0)
    ]
    assert left == pytest.approx(ends[2], rel=1e-4)
    assert float(gain.sum()) == pytest.approx((ends[1] - ends[0]) / 0.02, rel=0.02)


def test_the_fisher_information_foretells_the_kl_of_small_edits() -> None:
    """Golden: KL of first plus that of all tokens, in fp64, under weak edits of one and of all sites."""
    data, parameters = make_data(repeats=40)
    fisher = estimate_fisher(data, parameters, 0)
    one = torch.zeros(len(fisher), dtype=torch.float64)
    one[0] = 0.05
    pairs = data.control[:3]
    base = logp_under(data, at_strengths(parameters, [0.0] * len(fisher)), pairs)
    for strengths in (one, torch.full_like(one, 0.03)):
        kl = F.kl_div(
            logp_under(data, at_strengths(parameters, strengths), pairs), base, log_target=True, reduction="none"
        )
        each = torch.stack([part[0] + part.mean() for part in kl.sum(-1).split([len(answer) for _, answer in pairs])])
        assert float(strengths @ fisher @ strengths) / 2 == pytest.approx(float(each.mean()), rel=0.3)


# ------------------------------------------------------------------------------------------ on the refuser
def both_edits() -> Plan:
    """One edit removes the refusal, the other a random axis."""
    plan = weak(refusing(), REFUSAL)
    return replace(plan, edits=(*plan.edits, *weak(refusing(), 9).edits))


def strengths_of(plan: Plan) -> list[float]:
    return [e.strength for e in plan.edits if isinstance(e, Edit)]


def test_only_what_weakens_the_behavior_is_edited() -> None:
    found = balance_plan(refusing(), both_edits(), asked(), SETTINGS, 0, Judge())
    assert found is not None
    by_axis = {int(e.basis.argmax()): e.strength for e in found.edits if isinstance(e, Edit)}
    assert by_axis[REFUSAL] > 0.3
    assert by_axis.get(9, 0.0) < 0.05 * by_axis[REFUSAL]


def test_where_no_edit_weakens_it_strengths_stay() -> None:
    """An edit that adds to the refusal: less than none of it would help, and that is no removal."""
    plan = weak(refusing(), REFUSAL)
    turned = replace(plan.edits[0], covectors=-plan.edits[0].along)  # type: ignore[union-attr, type-var]
    assert balance_plan(refusing(), replace(plan, edits=(turned,)), asked(), SETTINGS, 0, Judge()) is None


def test_without_typical_first_tokens_answers_tell_the_behavior() -> None:
    """Groups that begin alike: their answers without the behavior are what is raised, and not a first token."""
    subject, prompts = refusing(), asked()
    alike = PromptSet({"target": prompts["target"], "control": prompts["target"]})
    data = collect_balance_data(subject, both_edits(), alike, SETTINGS, Judge())
    yes = byte(subject.tokenizer, "Y")
    assert all(answer[0] == yes for _, answer in data.target)
    typical = collect_balance_data(subject, both_edits(), prompts, SETTINGS, Judge())  # control
    assert not any(answer[0] == yes for _, answer in typical.target)
    left, _ = measure_gain(data, EditParameters(both_edits(), subject.device, "strengths"))
    assert left > MARGIN


# ---------------------------------------------------------------------------------------------- strengths
def search_check() -> SearchCheck:
    return SearchCheck(refusing(), asked(), Judge(), 6)


def test_strengths_rise_until_the_judge_finds_the_goal_reached() -> None:
    check, plan = search_check(), weak(refusing(), REFUSAL)
    start = replace(plan, edits=(replace(plan.edits[0], strength=0.4),))  # type: ignore[type-var]
    assert check.check(start).rate > 0
    found = find_weakest(check, start, 0.0)
    assert check.check(found.plan).rate == 0
    assert found.plan == found.front[-1].plan
    assert strengths_of(found.plan)[0] == pytest.approx(0.4 * found.front[-1].scale)
    assert found.front[-1].scale > 1


def test_strengths_fall_for_as_long_as_the_goal_is_reached() -> None:
    """From twice the removal: what is chosen is weaker, and a step below it the behavior is back."""
    plan = weak(refusing(), REFUSAL)
    strong = replace(plan, edits=(replace(plan.edits[0], strength=2.0),))  # type: ignore[type-var]
    check = search_check()
    found = find_weakest(check, strong, 0.0)
    chosen = strengths_of(found.plan)[0]
    assert chosen < 2.0
    assert check.check(found.plan).rate == 0
    below = replace(plan, edits=(replace(plan.edits[0], strength=chosen / FACTOR),))  # type: ignore[type-var]
    assert check.check(below).rate > 0


def test_a_fit_without_steps_balances_and_finds_the_weakest() -> None:
    prompts = asked()
    found = tune_plan(refusing(), both_edits(), Splits(prompts, prompts, prompts, ""), SETTINGS)
    check = search_check()
    assert (check.check(Plan()).rate, check.check(found.plan).rate) == (1, 0)
    assert len(found.plan.edits) == 1  # the random axis is left out
