"""Balanced strengths: gain and cost as measured by small changes, the cheapest combination, and what gains nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from tests.support.refuser import END, REFUSAL, asked, refuser
from tests.support.tiny import tiny_subject
from tests.support.tuning import plan_for, prompt_pairs, random_upper_plan
from tests.tune.test_fit import MEMORY, refusing, weak
from torch.nn import functional as F

from obliteratus.core.errors import NothingToFitError
from obliteratus.core.settings import Tune
from obliteratus.core.types import Edit, Plan, Splits
from obliteratus.excise.live.hooks import applied
from obliteratus.judge.judge import Judge
from obliteratus.tune.balance import balance_plan, estimate_fisher, measure_gain, solve_nonnegative
from obliteratus.tune.fit import make_tuning_data, tune_plan
from obliteratus.tune.parameters import EditParameters
from obliteratus.tune.search_check import Checked, SearchCheck
from obliteratus.tune.targets import TrainingPairs
from obliteratus.tune.tuning_data import TuningData
from obliteratus.tune.weakest import FACTOR, MARGIN, find_weakest

N = 12
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
def make_data(repeats: int = 1) -> tuple[TuningData, EditParameters]:
    """A tiny Llama with random edits at strength 0, with prompts and answers."""
    subject = tiny_subject("llama")
    pairs = prompt_pairs(subject, 6)
    train = TrainingPairs(pairs[:3] * repeats, pairs[3:])
    data = TuningData(subject, train, TrainingPairs([], []), SETTINGS, MEMORY)
    parameters = EditParameters(random_upper_plan(subject, plan_for, kind="oblique"), subject.device, "strengths")
    parameters.scale(0.0)
    return data, parameters


def at_strengths(parameters: EditParameters, strengths: Sequence[float] | torch.Tensor) -> Plan:
    edits = [replace(p.to_edit(), strength=float(s)) for p, s in zip(parameters.edits, strengths, strict=True)]
    return replace(parameters.plan, edits=tuple(edits))


@torch.no_grad()
def logp_under(data: TuningData, plan: Plan, pairs: Sequence[tuple[list[int], list[int]]]) -> torch.Tensor:
    with applied(data.subject, plan):
        return data.cached.logp(pairs).double()


def test_the_gain_is_the_slope_of_what_is_left() -> None:
    """Golden: central differences, in fp64, of how far answers fall short of what the unedited model would write."""
    data, parameters = make_data()
    tokens = torch.tensor([token for _, answer in data.train.target for token in answer])
    chosen = logp_under(data, at_strengths(parameters, [0.0] * len(parameters.edits)), data.train.target).argmax(-1)

    def left_at(strength: float) -> float:
        logp = logp_under(data, at_strengths(parameters, [strength] * len(parameters.edits)), data.train.target)
        short = 1.0 + logp.gather(1, chosen[:, None])[:, 0] - logp.gather(1, tokens[:, None])[:, 0]
        return float((short.clamp(min=0) * (tokens != chosen)).sum()) / len(data.train.target)

    left, gain = measure_gain(data, parameters)
    assert left == pytest.approx(left_at(0.0), rel=1e-4)
    assert float(gain.sum()) == pytest.approx((left_at(-0.01) - left_at(0.01)) / 0.02, rel=0.02)


def test_the_fisher_information_foretells_the_kl_of_small_edits() -> None:
    """Golden: KL of first plus that of all tokens, in fp64, under weak edits of one and of all sites."""
    data, parameters = make_data(repeats=40)
    fisher = estimate_fisher(data, parameters)
    one = torch.zeros(len(fisher), dtype=torch.float64)
    one[0] = 0.05
    pairs = data.train.control[:3]
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


def data_of(plan: Plan) -> TuningData:
    prompts = asked()
    return make_tuning_data(refusing(), plan, Splits(prompts, prompts, prompts, ""), SETTINGS, 0, Judge())


def strengths_of(plan: Plan) -> list[float]:
    return [e.strength for e in plan.edits if isinstance(e, Edit)]


def test_only_what_weakens_the_behavior_is_edited() -> None:
    found = balance_plan(data_of(both_edits()), both_edits())
    assert found is not None
    by_axis = {int(e.basis.argmax()): e.strength for e in found.edits if isinstance(e, Edit)}
    assert by_axis[REFUSAL] > 0.3
    assert by_axis.get(9, 0.0) < 0.05 * by_axis[REFUSAL]


def test_where_no_edit_weakens_it_strengths_stay() -> None:
    """An edit that adds to the refusal: less than none of it would help, and that is no removal."""
    plan = weak(refusing(), REFUSAL)
    turned = replace(plan.edits[0], covectors=-plan.edits[0].along)  # type: ignore[union-attr, type-var]
    adding = replace(plan, edits=(turned,))
    assert balance_plan(data_of(plan), adding) is None


def test_without_an_answer_to_fit_to_strengths_stay() -> None:
    """Where everything refuses under every edit, the run goes on with what EXCISE planned, and says so."""
    elsewhere, prompts = weak(refusing(), 9), asked()
    splits = Splits(prompts, prompts, prompts, "")
    with pytest.raises(NothingToFitError):
        data_of(elsewhere)
    found = tune_plan(refusing(), elsewhere, splits, SETTINGS)
    assert strengths_of(found.plan)[0] >= strengths_of(elsewhere)[0]
    with pytest.raises(NothingToFitError):  # a fit by gradients has nothing to go by
        tune_plan(refusing(), elsewhere, splits, SETTINGS.model_copy(update={"steps": 10}))


# ---------------------------------------------------------------------------------------------- strengths
def search_check() -> SearchCheck:
    return SearchCheck(refusing(), asked(), Judge(), 6)


def test_strengths_rise_until_the_judge_finds_the_goal_reached() -> None:
    check = search_check()
    start = at_strength(0.4)
    assert check.check(start).rate > 0
    found = find_weakest(check, start, 0.0)
    assert check.check(found.plan).rate == 0
    chosen = strengths_of(found.plan)[0]
    assert chosen > 0.4
    assert check.check(at_strength(chosen / MARGIN)).rate == 0
    assert check.check(at_strength(chosen / MARGIN / FACTOR**0.5)).rate > 0


def test_strengths_fall_for_as_long_as_the_goal_is_reached() -> None:
    """From twice the removal: what is chosen is weaker, and a step below it the behavior is back."""
    check = search_check()
    found = find_weakest(check, at_strength(2.0), 0.0)
    chosen = strengths_of(found.plan)[0]
    assert chosen < 2.0
    assert check.check(found.plan).rate == 0
    assert check.check(at_strength(chosen / MARGIN / FACTOR**0.5)).rate > 0


def test_the_margin_is_left_out_where_it_brings_loops() -> None:
    class Loops(SearchCheck):
        """Calls every answer under strengths above 0.9 a loop."""

        def check(self, plan: Plan) -> Checked:
            strong = any(strength > 0.9 for strength in strengths_of(plan))
            return replace(super().check(plan), degenerate=1.0 if strong else 0.0)

    chosen = {}
    for kind in (SearchCheck, Loops):
        check = kind(refusing(), asked(), Judge(), 6)
        chosen[kind] = strengths_of(find_weakest(check, at_strength(0.4), 0.0).plan)[0]
    assert chosen[SearchCheck] > 0.9
    assert chosen[Loops] == pytest.approx(chosen[SearchCheck] / MARGIN)


def test_edited_answers_may_loop_as_often_as_control_answers_did() -> None:
    """The unedited model refuses targets without loops; its control answers are asked for only where that matters."""
    fluent = search_check()
    assert fluent.usual_loops == 0
    assert fluent.excess(Checked(0.0, 0.25, 0.0), 0.0) == pytest.approx(0.2)
    endless = refuser(word="I cannot help.")
    endless.model.get_input_embeddings().weight[:, END] = 0  # its control answers are "YYYY …"
    looping = SearchCheck(endless, asked(), Judge(), 24)
    assert looping.excess(Checked(0.0, 0.05, 0.0), 0.0) == 0
    assert "usual_loops" not in vars(looping)
    assert looping.usual_loops == 1
    assert looping.excess(Checked(0.0, 0.25, 0.0), 0.0) == 0


def at_strength(strength: float) -> Plan:
    plan = weak(refusing(), REFUSAL)
    return replace(plan, edits=(replace(plan.edits[0], strength=strength),))  # type: ignore[type-var]


def test_a_fit_without_steps_balances_and_finds_the_weakest() -> None:
    prompts = asked()
    found = tune_plan(refusing(), both_edits(), Splits(prompts, prompts, prompts, ""), SETTINGS)
    check = search_check()
    assert (check.check(Plan()).rate, check.check(found.plan).rate) == (1, 0)
    assert len(found.plan.edits) == 1  # the random axis is left out
