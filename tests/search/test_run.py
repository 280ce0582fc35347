"""A search on the tiny refuser: every trial is a live plan, and the front is real."""

from __future__ import annotations

import pytest
import torch
from tests.support.searches import make_scorer, run_search, search_prompts, search_recipe, search_subject

from obliteratus.core.errors import UserError
from obliteratus.core.pareto import find_nearest_to_ideal
from obliteratus.core.run_folder import Store
from obliteratus.core.types import Prompt, PromptSet
from obliteratus.pipeline.presets import list_methods
from obliteratus.pipeline.recipe import load_recipe
from obliteratus.pipeline.run import run
from obliteratus.prompts import split_prompts
from obliteratus.search import SearchResult, StudyLocation, add_default_search, search, set_trial_count
from obliteratus.search.optuna_study import SearchStudy
from obliteratus.search.run import check_pick, measure_front, pick_member, thin_front
from obliteratus.search.storage import open_storage
from obliteratus.search.trials import Trial, rebuild_plan, run_trials

TRIALS = 10


@pytest.fixture(scope="session")
def weights() -> dict[str, torch.Tensor]:
    """The model's weights before the search."""
    return {name: p.clone() for name, p in search_subject().model.named_parameters()}


@pytest.fixture(scope="session")
def found(weights: dict[str, torch.Tensor]) -> SearchResult:
    """One finished search, for all tests that only look at its result."""
    return run_search(search_recipe(TRIALS))


def test_it_finds_what_ends_refusals_and_says_so(found: SearchResult) -> None:
    assert found.run.before["refusal.target"].value == 1.0
    assert found.run.after["refusal.target"].value == 0.0
    best = found.front[0]
    assert best.scores["refusal.target"] == 0.0
    assert len(found.trials) == found.run.search["trials"] == TRIALS
    for a in found.front:  # nothing in the front is dominated by any checked member
        assert not any(b.objectives < a.objectives and b.objectives[1] <= a.objectives[1] for b in found.front)


def test_the_model_is_as_it_was(weights: dict[str, torch.Tensor], found: SearchResult) -> None:
    assert all(torch.equal(p, weights[name]) for name, p in search_subject().model.named_parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in search_subject().model.modules())


def test_what_the_winner_measured_is_what_is_evaluated(found: SearchResult) -> None:
    """Same values, same plan, same scores; another trial's plan gives others."""
    recipe = search_recipe(TRIALS)
    cache, judge = make_scorer(recipe)
    winner = found.front[found.picked].trial
    plan = rebuild_plan(winner, recipe, cache)
    for a, b in zip(plan.edits, found.plan.edits, strict=True):
        assert torch.equal(a.basis, b.basis)  # type: ignore[union-attr]
        assert a.strength == b.strength  # type: ignore[union-attr]
    assert judge.estimate(plan).scores["kl.first_token.mean"] == winner.scores["kl.first_token.mean"]
    others = [t for t in found.trials if t.values != winner.values]
    kls = {judge.estimate(rebuild_plan(t, recipe, cache)).scores["kl.first_token.mean"] for t in others}
    assert kls != {winner.scores["kl.first_token.mean"]}


def test_the_winner_is_a_recipe_that_runs(found: SearchResult) -> None:
    recipe = found.front[found.picked].recipe
    assert recipe.search is None
    again = run(recipe, search_subject(), search_prompts()).run
    assert {k: s.value for k, s in again.after.items()} == {k: s.value for k, s in found.run.after.items()}


def test_every_recipe_can_be_searched() -> None:
    plain = load_recipe("basic", {"verify": [{"use": "behavior", "tokens": 6}, {"use": "first_token_kl"}]})
    space = add_default_search(plain)
    assert space.search is not None
    assert {p.split(".")[-1] for p in space.search.space} == {"attn", "mlp", "low"}
    assert run_search(set_trial_count(space, 3)).trials[0].objectives[0] == 0.0  # begins as `basic` itself
    assert add_default_search(space) is space


def test_no_feasible_trial() -> None:
    """All trials refuse more controls than allowed: a clear end, and the study keeps them."""
    recipe = search_recipe(3, control_margin=0.0)
    cache, judge = make_scorer(recipe)
    judge.measure_excess = lambda scores: {"control_margin": 0.5}  # type: ignore[method-assign]
    study = SearchStudy(open_storage(""), "s", recipe, {})
    trials = run_trials(study, recipe, cache, judge, 3)
    assert len(study.finished) == 3
    with pytest.raises(UserError, match=r"none of 3 trials kept within all limits \(3 exceed search.control_margin\)"):
        measure_front(trials, recipe, cache, judge, StudyLocation("", "s"))


def test_nothing_to_search_for() -> None:
    """Groups that are refused alike: no first token tells them apart."""
    same = PromptSet({"target": search_prompts()["control"], "control": search_prompts()["target"]})
    splits, location = split_prompts(same, 0, force=True), StudyLocation("", "s")
    with pytest.raises(UserError, match="there is nothing to search for"):
        search(search_recipe(2), search_subject(), splits, Store(), location, force=True)


def test_objectives_that_no_scorer_gives() -> None:
    with pytest.raises(UserError, match=r"search\.minimize: 'perplexity\.ratio' is no score of a trial; use one of: "):
        run_search(search_recipe(2, minimize=("refusal.target", "perplexity.ratio")))


def test_picks(found: SearchResult) -> None:
    front = found.front
    assert pick_member(front, "balanced") == find_nearest_to_ideal([m.objectives for m in front])
    assert pick_member(front, "first") == 0
    assert pick_member(front, "last") == len(front) - 1
    assert pick_member(front, "1") == 0
    for wrong in ("0", str(len(front) + 1), "best"):
        with pytest.raises(UserError, match="--pick"):
            pick_member(front, wrong)
    with pytest.raises(UserError, match="--pick knee is now called --pick balanced"):
        check_pick("knee")


def test_thinned_keeps_the_ends() -> None:
    front = [Trial(n, {}, (float(n),), {}, True, True, 0.0) for n in range(25)]
    assert [t.number for t in thin_front(front, 4)] == [0, 8, 16, 24]
    assert thin_front(front[:2], 10) == front[:2]


@pytest.mark.parametrize("name", [name for name in list_methods() if load_recipe(name).search])
def test_every_method_that_searches_runs_trials(name: str) -> None:
    """One trial says little: only later ones can differ from what the study already holds."""
    changes = {"verify": [{"use": "behavior", "tokens": 6}, {"use": "first_token_kl"}], "search.trials": 4}
    limits = {"search.tokens": 4, "search.control_margin": 1.0, "search.degenerate_margin": 1.0}
    groups = {
        g: tuple(Prompt(f"{p.text} {i}", split=p.split) for p in members for i in range(3))  # an SAE takes 50 prompts
        for g, members in search_prompts().groups.items()
    }
    groups |= {
        more: tuple(Prompt(f"{p.text} too", split=p.split) for p in groups[like])
        for more, like in (("keep", "target"), ("benign", "control"))
    }
    splits = split_prompts(PromptSet(groups), 0, force=True)
    found = search(load_recipe(name, changes | limits), search_subject(), splits, Store(), StudyLocation("", "study"))
    assert len({str(trial.values) for trial in found.trials}) == 4
