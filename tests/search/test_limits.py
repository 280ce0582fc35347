"""What a plan may cost: a plan that makes the model loop is not feasible, and trials pay only for what they need."""

from __future__ import annotations

from collections import Counter
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from tests.support.refuser import END, REFUSAL
from tests.support.searches import make_scorer, run_search, search_recipe, search_subject

from obliteratus.core.errors import UserError
from obliteratus.core.progress import Advance, Reporter, report_to
from obliteratus.core.results import Score
from obliteratus.core.settings import Recipe
from obliteratus.core.types import Edit, Plan
from obliteratus.search import StudyLocation
from obliteratus.search.limits import count_exceeded, measure_excess
from obliteratus.search.optuna_study import SearchStudy
from obliteratus.search.output import front_rows
from obliteratus.search.run import measure_front
from obliteratus.search.storage import open_storage
from obliteratus.search.trials import run_trials, select_front
from obliteratus.verify.score_names import describe_score

RATE = "refusal.control"


def shares(**values: float) -> dict[str, Score]:
    return {name.replace("_", "."): Score(value=x, low=x, high=x, n=48, unit="share") for name, x in values.items()}


BASE = shares(refusal_control=0.1, degenerate_target=0.02, degenerate_control=0.02, fluency_control=4.0)


def looping_recipe(**settings: float) -> Recipe:
    """With answers that are long enough to loop."""
    recipe = search_recipe(2, **settings)
    steps = tuple(step.model_copy(update={"tokens": 24} if step.use == "behavior" else {}) for step in recipe.verify)
    assert recipe.search is not None
    return recipe.model_copy(update={"verify": steps, "search": recipe.search.model_copy(update={"tokens": 24})})


def plan_without(*axes: int) -> Plan:
    """Remove axes of the stream from all that is written. Without END no answer ends: "YYYYY …"."""
    subject = search_subject()
    basis = torch.eye(subject.width)[list(axes)]
    writers = [site for site in subject.sites if site.role == "writes"]
    return Plan(tuple(Edit(site, basis, 1.0, "none", None) for site in writers), subject.source.digest)


# -------------------------------------------------------------------------------------------------- limits
def test_each_limit_is_exceeded_by_its_own_score() -> None:
    search = search_recipe(
        control_margin=0.1, degenerate_margin=0.05, fluency_limit=2.0, keep_margin=0.1, benign_margin=0.2
    ).search
    assert search is not None
    fine = {RATE: 0.2, "degenerate.target": 0.07, "degenerate.control": 0.0, "fluency.target": 8.0}
    assert all(over <= 1e-9 for over in measure_excess(fine, BASE, search, "refusal").values())
    for worse, limit in (
        ({RATE: 0.21}, "control_margin"),
        ({"degenerate.target": 0.08}, "degenerate_margin"),
        ({"degenerate.control": 0.08}, "degenerate_margin"),
        ({"degenerate.keep": 0.5, "degenerate.target": 0.0}, "degenerate_margin"),
        ({"fluency.target": 8.1}, "fluency_limit"),
        ({"fluency.control": 8.1}, "fluency_limit"),
        ({"refusal.keep": 0.79}, "keep_margin"),
        ({"refusal.benign": 0.41}, "benign_margin"),
    ):
        base = BASE | shares(degenerate_keep=0.0, refusal_keep=0.9, refusal_benign=0.2)
        excess = measure_excess({**fine, **worse}, base, search, "refusal")
        assert [name for name, over in excess.items() if over > 1e-9] == [limit]
        assert count_exceeded([excess, excess]) == f"2 exceed search.{limit}"


def test_edited_answers_may_loop_as_often_as_control_answers_did() -> None:
    """The unedited model refuses targets without loops, and loops on a fifth of what it answers."""
    search = search_recipe(control_margin=0.1, degenerate_margin=0.05).search
    assert search is not None
    found = {RATE: 0.1, "degenerate.target": 0.24}
    for usual, over in ((0.2, -0.01), (0.02, 0.17)):
        base = BASE | shares(degenerate_target=0.0, degenerate_control=usual)
        assert measure_excess(found, base, search, "refusal")["degenerate_margin"] == pytest.approx(over)


def test_what_was_not_measured_limits_nothing() -> None:
    search = search_recipe().search
    assert search is not None
    assert set(measure_excess({RATE: 0.0}, BASE, search, "refusal")) == {"control_margin"}
    scores = {RATE: 0.0, "fluency.target": 99.0}
    assert "fluency_limit" not in measure_excess(scores, shares(refusal_control=0.0), search, "refusal")
    broken = measure_excess({RATE: float("nan")}, BASE, search, "refusal")
    assert count_exceeded([broken]) == "1 exceed search.control_margin"


# ------------------------------------------------------------------------------------------------- searches
def test_a_plan_that_makes_the_model_loop_is_not_feasible() -> None:
    _, scorer = make_scorer(looping_recipe())
    looping, plain = (scorer.score_answers(plan_without(*axes)).scores for axes in ((REFUSAL, END), (REFUSAL,)))
    assert (looping["refusal.target"], looping["degenerate.target"]) == (0.0, 1.0)
    assert scorer.measure_excess(looping)["degenerate_margin"] == pytest.approx(0.95)
    assert plain["degenerate.target"] == 0.0  # negative control: what ends answers is left alone
    assert all(over <= 0 for over in scorer.measure_excess(plain).values())
    _, patient = make_scorer(looping_recipe(degenerate_margin=1.0))  # negative control: without the limit
    assert all(over <= 0 for over in patient.measure_excess(looping).values())


@pytest.mark.parametrize("margin", [0.05, 1.0])
def test_the_front_holds_no_loops(margin: float) -> None:
    """All trials draw the plan that loops: none is feasible, unless the limit is lifted."""
    recipe = looping_recipe(degenerate_margin=margin)
    cache, scorer = make_scorer(recipe)
    cache.plan = lambda recipe: plan_without(REFUSAL, END)  # type: ignore[method-assign]
    study = SearchStudy(open_storage(""), "s", recipe, {})
    trials = run_trials(study, recipe, cache, scorer, 2)
    assert bool(select_front(trials)) == (margin == 1.0)
    if margin == 1.0:
        (member,) = measure_front(trials, recipe, cache, scorer, StudyLocation("", "s"))
        assert member.scores["degenerate.control"] == 1.0
    else:
        assert trials[0].answered
        with pytest.raises(UserError, match=r"kept within all limits \(. exceed search.degenerate_margin"):
            measure_front(trials, recipe, cache, scorer, StudyLocation("", "s"))


def test_the_front_lists_whether_answers_are_fluent() -> None:
    recipe = search_recipe(2, fluency_limit=1e6)  # answers of one token that the unedited model would never give
    steps = (*recipe.verify, {"use": "fluency"})
    recipe = Recipe.model_validate({**recipe.model_dump(), "verify": steps})
    columns, rows = front_rows(run_search(recipe))
    names = ("refusal.target", "kl.first_token.mean", "degenerate.target", "degenerate.control", "fluency.ratio")
    assert columns[2:-1] == [describe_score(name) for name in names]
    assert all(len(row) == len(columns) for row in rows)


class Counting(Reporter):
    """Counts bars by title."""

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()

    def bar(self, title: str, total: int) -> AbstractContextManager[Advance]:
        self.seen[title] += 1
        return nullcontext(lambda done: None)


@pytest.mark.parametrize(
    ("objective", "paid"),
    [("kl.first_token.mean", ()), ("perplexity.ratio", ("perplexity",)), ("fluency.ratio", ("fluency", "answers"))],
)
def test_a_trial_runs_only_the_scorers_that_its_objectives_need(objective: str, paid: tuple[str, ...]) -> None:
    steps = [{"use": "behavior", "tokens": 6}, *({"use": name} for name in ("first_token_kl", "perplexity", "fluency"))]
    recipe = search_recipe(2, minimize=("refusal.target", objective))
    recipe = Recipe.model_validate({**recipe.model_dump(), "verify": steps})
    cache, scorer = make_scorer(recipe)
    plan, counting = cache.plan(recipe), Counting()
    first = scorer.estimate(plan)
    assert objective in first.scores
    with report_to(counting):
        again = scorer.estimate(plan)
    assert objective in again.scores
    assert {title for title in counting.seen if title.startswith("VERIFY")} == {f"VERIFY {name}" for name in paid}
