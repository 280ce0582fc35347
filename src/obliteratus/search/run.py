"""A whole search: baseline, trials, a longer check of the front, and the chosen member proved on report prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from obliteratus.core.errors import UserError
from obliteratus.core.progress import note
from obliteratus.core.results import Run
from obliteratus.core.run_folder import Store
from obliteratus.core.settings import Recipe
from obliteratus.core.types import Plan, PromptSet, Subject
from obliteratus.excise.live.hooks import applied
from obliteratus.pipeline.offloaded import measured
from obliteratus.pipeline.recipe import check_runs, without_trial_count
from obliteratus.pipeline.run import proved
from obliteratus.prompts import parts_checked
from obliteratus.search.front import nearest_to_ideal, pareto_front
from obliteratus.search.ground import DirectionCache
from obliteratus.search.judge import TrialJudge, objective_value, opening_texts
from obliteratus.search.space import trial_recipe
from obliteratus.search.storage import open_storage
from obliteratus.search.study import SearchStudy
from obliteratus.search.trials import Trial, front_trials, run_trials, trial_plan
from obliteratus.verify.refusal import GROUPS

# The longer check costs some ten trials' time a member; a front has seldom more, and of more the ends and even steps
# between them say as much.
CHECKED = 10
PICKS = ("knee", "first", "last")


@dataclass(frozen=True)
class Member:
    """One trial of the front, with what the longer check found."""

    trial: Trial
    recipe: Recipe
    plan: Plan
    """What the trial measured."""
    objectives: tuple[float, ...]
    scores: Mapping[str, float]


@dataclass(frozen=True)
class SearchResult:
    """What a search came to."""

    plan: Plan
    run: Run
    front: tuple[Member, ...]
    """Fewest of the first objective first."""
    picked: int
    """Which of them `run` and `plan` are of."""
    trials: tuple[Trial, ...]


@dataclass(frozen=True)
class StudyLocation:
    """Where the study is kept, and what it is called there."""

    storage: str
    """A file, or a URL that Optuna knows."""
    name: str


def search(
    made: Recipe, subject: Subject, prompts: PromptSet, store: Store, place: StudyLocation, pick: str = "knee"
) -> SearchResult:
    """Try the recipe's space, and prove the chosen member on report prompts that no trial saw. Changes no weight.

    made: a recipe with a search (`searchable`). pick: ``knee`` (farthest below the line between the front's ends),
    ``first`` (fewest of the first objective), ``last``, or a member's number from 1. Raises UserError for what the
    user can mend; finished trials stay in the study.
    """
    assert made.search is not None, "give a recipe that `searchable` made"
    check_runs(made, prompts.groups)
    fit, held, report = parts_checked(prompts, made.seed, searched=True)
    before = measured(store, "VERIFY before", subject, report, made.verify)
    some = PromptSet({g: held[g][: made.search.prompts] for g in GROUPS if g in held.groups})
    base = measured(store, "VERIFY search", subject, some, made.verify)
    ground, judge = DirectionCache(subject, fit, made, store), TrialJudge(subject, some, made, base)
    note("SEARCH", f"refusals begin with {opening_texts(judge)}")
    study = SearchStudy(open_storage(place.storage), place.name, made, study_identity(made, subject, prompts))
    trials = run_trials(study, made, ground, judge, made.search.trials)
    front = measure_front(trials, made, ground, judge, place)
    chosen = pick_member(front, pick)
    winner = front[chosen]
    told = {"search": describe_search(made, place, trials, front, chosen)}
    run = proved(store, winner.recipe, subject, prompts, winner.plan, before, told)
    return SearchResult(winner.plan, run, tuple(front), chosen, tuple(trials))


def study_identity(made: Recipe, subject: Subject, prompts: PromptSet) -> dict[str, Any]:
    """What all trials of a study must share; how many there are is free."""
    return {"model": subject.source.digest, "prompts": prompts.digest, "recipe": without_trial_count(made)}


def measure_front(
    trials: Sequence[Trial], made: Recipe, ground: DirectionCache, judge: TrialJudge, place: StudyLocation
) -> list[Member]:
    """The front, its members measured with the recipe's own verify steps; those that turn out worse drop out.

    Raises UserError where no trial is feasible.
    """
    good = front_trials(trials)
    if not good:
        raise UserError(
            f"search: none of {len(trials)} trials kept refusals of control prompts within search.control_margin; "
            f"they are in the study '{place.name}' of {place.storage}. Widen the space, or allow more"
        )
    measure = partial(_checked, made=made, ground=ground, judge=judge)
    found = [member for member in map(measure, thin_front(good, CHECKED)) if judge.excess(member.scores) <= 0]
    best = [found[i] for i in pareto_front([m.objectives for m in found])]
    if not best:
        raise UserError("search: longer answers refuse too many control prompts in every member; allow more")
    return sorted(best, key=lambda m: m.objectives)


def _checked(trial: Trial, made: Recipe, ground: DirectionCache, judge: TrialJudge) -> Member:
    plan = trial_plan(trial, made, ground)
    with applied(ground.subject, plan):
        found = measured(Store(), f"CHECK {trial.number}", ground.subject, judge.prompts, made.verify, judge.before)
    scores = {**trial.scores, **{name: score.value for name, score in found.scores.items()}}
    assert made.search is not None
    values = tuple(objective_value(name, scores) for name in made.search.minimise)
    return Member(trial, trial_recipe(made, trial.values), plan, values, scores)


def thin_front(front: Sequence[Trial], most: int) -> list[Trial]:
    """At most so many, evenly over the front, both ends among them."""
    if len(front) <= most:
        return list(front)
    return [front[round(i * (len(front) - 1) / (most - 1))] for i in range(most)]


def pick_member(front: Sequence[Member], pick: str) -> int:
    """Index of the chosen member. Raises UserError for a number that the front has not."""
    if pick == "knee":
        return nearest_to_ideal([m.objectives for m in front])
    if pick in PICKS:
        return 0 if pick == "first" else len(front) - 1
    if not pick.isdigit() or not 1 <= int(pick) <= len(front):
        raise UserError(f"--pick {pick}: give {', '.join(PICKS)}, or a member of the front, 1 to {len(front)}")
    return int(pick) - 1


def check_pick(pick: str) -> None:
    """Refuse, before any trial, what no front can have."""
    if pick not in PICKS and not (pick.isdigit() and int(pick) >= 1):
        raise UserError(f"--pick {pick}: give {', '.join(PICKS)}, or the number of a member of the front")


def describe_search(
    made: Recipe, place: StudyLocation, trials: Sequence[Trial], front: Sequence[Member], chosen: int
) -> dict[str, Any]:
    """Of the search, for run.json."""
    assert made.search is not None
    return {
        "study": place.name,
        "minimise": list(made.search.minimise),
        "sampler": made.search.sampler,
        "trials": len(trials),
        "answered": sum(t.answered for t in trials),
        "seconds": round(sum(t.seconds for t in trials), 1),
        "picked": chosen + 1,
        "front": [{"trial": m.trial.number, "values": m.trial.values, "scores": dict(m.scores)} for m in front],
    }


def with_trials(made: Recipe, trials: int) -> Recipe:
    """The recipe with so many trials."""
    assert made.search is not None
    return made.model_copy(update={"search": made.search.model_copy(update={"trials": trials})})
