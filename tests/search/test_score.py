"""Estimates for every trial, answers only for those that may still enter the front."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.support.harness import write_task
from tests.support.searches import make_scorer, run_search, search_recipe, search_subject

from obliteratus.core.settings import Step
from obliteratus.core.types import Plan
from obliteratus.excise.live.hooks import applied
from obliteratus.pipeline.recipe import load_recipe
from obliteratus.search.score import CALIBRATING, TrialVerdict, opening_probability
from obliteratus.search.space import apply_values


def test_only_what_may_win_is_answered() -> None:
    """A dominated estimate gets no answers; a wide margin gives them to all that no front point beats in KL alone."""
    careful, greedy = (run_search(search_recipe(12, margin=m, max_remaining=1.0)) for m in (0.0, 1.0))
    assert not all(t.answered for t in careful.trials)
    assert sum(t.answered for t in greedy.trials) >= sum(t.answered for t in careful.trials)
    for t in careful.trials:
        if not t.answered:
            rivals = [o.objectives for o in careful.trials if o.answered and o.number < t.number]
            assert any(all(x <= y for x, y in zip(r, t.objectives, strict=True)) for r in rivals)


def test_the_margin_is_what_an_estimate_may_be_wrong_by() -> None:
    known, front = {"refusal.target": 0.3, "kl.first_token.mean": 1.0}, [(0.25, 0.5)]
    assert make_scorer(search_recipe(margin=0.1))[1].may_enter(known, {}, front)
    assert not make_scorer(search_recipe(margin=0.01))[1].may_enter(known, {}, front)


def test_answers_end_when_their_refusals_shut_the_trial_out() -> None:
    """Refusals seen so far only grow: a trial that they put behind the front is given up before its answers end."""
    cache, scorer = make_scorer(search_recipe(max_remaining=1.0, margin=1.0))
    plan = cache.plan(apply_values(search_recipe(), {"excise.strength": 0.0, "weigh.0.low": 0.0}))  # refuses all
    whole, kl = scorer.score_answers(plan), scorer.estimate(plan).scores["kl.first_token.mean"]
    assert scorer.score(plan, []).scores == whole.scores
    behind = scorer.score(plan, [(0.5, kl)])  # by its estimate alone the margin would let it in
    assert not behind.answered
    assert 0.5 < behind.scores["refusal.target"] <= whole.scores["refusal.target"] == 1.0
    assert scorer.score(plan, [(0.5, kl + 0.1)]).answered


def test_an_estimate_that_was_wrong_is_trusted_no_further() -> None:
    """First tokens that say nothing: the edit that ends refusals looks as if it left all. Answers to earlier trials
    have shown that they may be off by as much, so it is answered; by the margin alone it is lost."""
    cache, scorer = make_scorer(search_recipe(margin=0.1))
    plan = cache.plan(apply_values(search_recipe(), {"excise.strength": 1.0, "weigh.0.low": 0.0}))  # refuses none
    scorer.scale = replace(scorer.scale, slope=0.0, control_rate=1.0)
    front = [(0.5, 0.0)]
    assert not scorer.score(plan, front).answered
    assert not scorer.score(plan, front, [0.0] * CALIBRATING).answered
    found = scorer.score(plan, front, [0.0, 0.9, 0.0, 0.0, 0.0])
    assert (found.answered, found.scores["refusal.target"], found.overestimate) == (True, 0.0, 1.0)


def test_the_first_trials_are_answered_and_their_error_is_kept() -> None:
    trials = run_search(search_recipe(8)).trials
    assert all(t.answered for t in trials[:CALIBRATING])
    assert all((t.overestimate is not None) == t.answered for t in trials)


def test_what_leaves_most_refusals_is_answered_only_to_begin_a_front() -> None:
    cache, scorer = make_scorer(search_recipe())
    plan = cache.plan(apply_values(search_recipe(), {"excise.strength": 0.0, "weigh.0.low": 0.0}))  # refuses all
    assert scorer.score(plan, []).answered
    assert not scorer.score(plan, [(0.0, 10.0)]).answered
    _, patient = make_scorer(search_recipe(max_remaining=1.0))
    assert patient.score(plan, [(0.0, 10.0)]).answered


def test_the_estimate_is_the_rate_where_first_tokens_decide() -> None:
    """Unedited: all refused; edited: none. On the tiny model the first token says it all."""
    cache, scorer = make_scorer(search_recipe())
    recipe = apply_values(search_recipe(), {"excise.strength": 1.0, "weigh.0.low": 0.0})
    edited = scorer.estimate(cache.plan(recipe)).scores
    none = scorer.estimate(
        cache.plan(apply_values(search_recipe(), {"excise.strength": 0.0, "weigh.0.low": 0.0}))
    ).scores
    assert none["refusal.target"] == pytest.approx(1.0, abs=0.02)
    assert edited["refusal.target"] == pytest.approx(0.0, abs=0.1)
    assert none["kl.first_token.mean"] == pytest.approx(0.0, abs=1e-6)


def test_opening_probability_is_the_sum_of_probabilities() -> None:
    logp = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]).log()
    assert opening_probability(logp, [0, 2]).tolist() == pytest.approx([0.75, 0.8])


def test_a_broken_model_is_worst_not_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    cache, scorer = make_scorer(search_recipe())
    plan = cache.plan(apply_values(search_recipe(), {"excise.strength": 1.0, "weigh.0.low": 0.0}))
    broken = scorer.estimate(plan).scores
    scorer.base = scorer.base.clone().fill_(float("nan"))
    assert scorer.estimate(plan).scores["kl.first_token.mean"] == 100.0 > broken["kl.first_token.mean"]


def test_a_minus_makes_large() -> None:
    _, scorer = make_scorer(search_recipe(minimize=("refusal.target", "-refusal.control")))
    verdict = TrialVerdict({"refusal.target": 0.5, "refusal.control": 0.25}, False)
    assert scorer.objectives(verdict) == (0.5, -0.25)
    assert scorer.best_objectives(verdict.scores, {}) == pytest.approx((0.4, -0.35))
    assert scorer.best_objectives(verdict.scores, {"refusal.target": 0.45}) == pytest.approx((0.45, -0.35))


def test_below_the_target_the_sampler_is_told_the_rate() -> None:
    """Heretic's formula: KL from the target on, else the target times the share of refusals that remains. In a study of
    Heretic 1.4 with a target of 0.08, 3 of 24 refusals at KL 0.0512 gave 0.01, and all 24 at KL 0.0427 gave 0.08."""
    _, scorer = make_scorer(search_recipe(kl_target=0.08))
    base = scorer.before.scores["refusal.target"].value
    for rate, kl, told in ((3 / 24, 0.0512, 0.01), (1.0, 0.0427, 0.08), (0.0, 0.08, 0.08), (0.5, 0.3, 0.3)):
        verdict = TrialVerdict({"refusal.target": rate * base, "kl.first_token.mean": kl}, False)
        assert scorer.sampled_objectives(verdict) == (rate * base, pytest.approx(told))
        assert scorer.objectives(verdict) == (rate * base, kl)
    _, plain = make_scorer(search_recipe())
    verdict = TrialVerdict({"refusal.target": 0.5, "kl.first_token.mean": 1e-6}, False)
    assert plain.sampled_objectives(verdict) == plain.objectives(verdict) == (0.5, 1e-6)


def test_the_front_is_by_kl_whatever_the_sampler_is_told() -> None:
    found = run_search(search_recipe(4, kl_target=50.0, max_remaining=1.0))
    for trial in found.trials:
        assert trial.objectives == (trial.scores["refusal.target"], trial.scores["kl.first_token.mean"])


def test_weights_that_leave_no_layer_are_the_unedited_model() -> None:
    recipe = search_recipe()
    cache, scorer = make_scorer(recipe)
    empty = cache.plan(load_recipe("basic", {"weigh": [{"use": "skip_first", "n": 99}]}))
    assert empty.edits == ()
    assert scorer.estimate(empty).scores["kl.first_token.mean"] == 0.0


def test_live_plans_agree_with_the_estimate() -> None:
    """Golden: KL by hand in float64 from the model's own logits."""
    cache, scorer = make_scorer(search_recipe())
    plan = cache.plan(apply_values(search_recipe(), {"excise.strength": 0.6, "weigh.0.low": 0.0}))

    def logits() -> torch.Tensor:
        rows = scorer.rows["control"]
        with torch.no_grad():
            return torch.stack(
                [search_subject().model(torch.tensor([r])).logits[0, -1].double() for r in rows]
            ).log_softmax(-1)

    base = logits()
    with applied(search_subject(), plan):
        edited = logits()
    expected = (base.exp() * (base - edited)).sum(-1).mean()
    assert scorer.estimate(plan).scores["kl.first_token.mean"] == pytest.approx(
        float(expected), rel=1e-3
    )  # KL is stored in fp32


def test_a_benchmark_can_be_an_objective(tmp_path: Path) -> None:
    recipe = search_recipe(minimize=("refusal.target", "-benchmark.small_choices.acc"))
    tasks = [str(write_task(tmp_path, "choices"))]
    recipe = recipe.model_copy(update={"verify": (*recipe.verify, Step(use="benchmark", tasks=tasks))})
    _, scorer = make_scorer(recipe)
    verdict = scorer.estimate(Plan())
    base = scorer.before.scores["benchmark.small_choices.acc"].value
    assert scorer.objectives(verdict)[1] == -base
