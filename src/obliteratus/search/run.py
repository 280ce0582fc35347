"""Run a search: measure the baseline, run trials, check the front with longer answers, evaluate the chosen member."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from obliteratus.core.errors import UserError
from obliteratus.core.pareto import MAX_CHECKED, find_nearest_to_ideal, pareto_front
from obliteratus.core.progress import note
from obliteratus.core.results import Run
from obliteratus.core.run_folder import Store
from obliteratus.core.settings import Recipe
from obliteratus.core.types import Plan, PromptSet, Splits, Subject
from obliteratus.core.views import Described, Plottable
from obliteratus.excise.live.hooks import applied
from obliteratus.pipeline.recipe import check_runs, without_trial_count
from obliteratus.pipeline.run import evaluate_plan
from obliteratus.pipeline.stages import Stages
from obliteratus.search.direction_cache import DirectionCache
from obliteratus.search.importance import compute_importances
from obliteratus.search.limits import count_exceeded
from obliteratus.search.optuna_study import SearchStudy
from obliteratus.search.score import TrialScorer, read_objective
from obliteratus.search.space import apply_values
from obliteratus.search.storage import open_storage
from obliteratus.search.trials import Trial, rebuild_plan, run_trials, select_front
from obliteratus.summon.fingerprint import describe_loading
from obliteratus.verify import Measurement, measure
from obliteratus.verify.behavior import GROUPS
from obliteratus.verify.scoring import NOTHING

PICKS = ("balanced", "first", "last")


@dataclass(frozen=True, repr=False)
class FrontMember(Described):
    """One trial of the front, with the scores of the longer check."""

    trial: Trial
    recipe: Recipe
    plan: Plan
    """The plan that the trial measured."""
    objectives: tuple[float, ...]
    scores: Mapping[str, float]
    records: Sequence[Mapping[str, Any]] = ()
    """The judged answers to search prompts of the longer check."""

    def describe(self) -> str:
        """Return the trial, its objectives and its plan."""
        objectives = ", ".join(f"{value:.3g}" for value in self.objectives)
        return f"trial {self.trial.number}, objectives {objectives}; {self.plan.describe()}"


@dataclass(frozen=True, repr=False)
class SearchResult(Plottable):
    """The result of a search."""

    plan: Plan
    run: Run
    before: Measurement
    after: Measurement
    front: tuple[FrontMember, ...]
    """Sorted by the first objective."""
    picked: int
    """Index of the member that ``plan`` and ``run`` belong to."""
    trials: tuple[Trial, ...]
    unedited: Measurement = NOTHING
    """What the longer check measured of the unedited model on the same search prompts."""

    def describe(self) -> str:
        """Return how many trials there were, how many are on the front, and which one was chosen."""
        chosen = f"member {self.picked + 1} is chosen (trial {self.front[self.picked].trial.number})"
        return f"{len(self.trials)} trials, {len(self.front)} on the front; {chosen}; {self.run.describe()}"


@dataclass(frozen=True)
class StudyLocation:
    """Where a study is stored, and its name there."""

    storage: str
    """A file, or a storage URL of Optuna; '' keeps the study in memory."""
    name: str


def search(
    recipe: Recipe,
    subject: Subject,
    splits: Splits,
    store: Store,
    location: StudyLocation,
    pick: str = "balanced",
    force: bool = False,
) -> SearchResult:
    """Search the recipe's space on search prompts, and evaluate the chosen member on report prompts. Changes no weight.

    recipe: one with a search (see `add_default_search`). pick: the member of the front to choose. ``balanced`` is the
    one nearest to the best value of every objective, ``first`` has the least of the first objective, ``last`` the most,
    and a number counts members from 1. force: edit a model that does not show the behavior. Raises UserError for what
    the user can mend; finished trials stay in the study.
    """
    recipe = check_runs(recipe, splits.fit.groups)
    assert recipe.search is not None, "give a recipe from add_default_search"
    stages = Stages(subject, splits, store, force=force).screened(recipe)
    before = stages.measure("VERIFY before", splits.report, recipe.verify)
    groups = splits.search.groups
    prompts = PromptSet({g: groups[g][: recipe.search.prompts] for g in GROUPS if g in groups})
    baseline = stages.measure("VERIFY search", prompts, recipe.verify)
    with store.clock.time("SEARCH"):
        cache = DirectionCache(stages, recipe)
        scorer = TrialScorer(subject, prompts, recipe, baseline, stages.judge)
        study = _open_study(recipe, stages, scorer, location)
        trials = run_trials(study, recipe, cache, scorer, recipe.search.trials)
    with store.clock.time("FRONT"):
        front = measure_front(trials, recipe, cache, scorer, location)
    picked = pick_member(front, pick)
    member = front[picked]
    described = describe_search(recipe, location, trials, front, picked) | {"minimize": scorer.minimize}
    described |= {"prompts": len(prompts["target"]), "base": describe_base(scorer.minimize, baseline)}
    record = {"search": described | {"importances": compute_importances(study.study, scorer.minimize)}}
    result = evaluate_plan(member.recipe, stages, member.plan, before, record)
    return SearchResult(*result, tuple(front), picked, tuple(trials), baseline)


def describe_base(minimize: Sequence[str], baseline: Measurement) -> dict[str, float]:
    """Return what the unedited model has of the objectives; its KL to itself is 0."""
    names = [name.removeprefix("-") for name in minimize]
    known = {name: baseline.scores[name].value for name in names if name in baseline.scores}
    return known | {name: 0.0 for name in names if name.startswith("kl.")}


def _open_study(recipe: Recipe, stages: Stages, scorer: TrialScorer, location: StudyLocation) -> SearchStudy:
    """Open or create the study, and say what its trials rest on."""
    assert recipe.search is not None
    note("SEARCH", f"{stages.judge.name} begins with {scorer.describe_openings()}")
    if recipe.search.trials <= recipe.search.startup_trials and recipe.search.sampler != "nsga2":
        note("SEARCH", f"all {recipe.search.trials} trials are drawn at random: startup_trials is not below trials")
    identity = {"model": stages.subject.source.digest, "prompts": stages.splits.digest}
    identity |= {"recipe": without_trial_count(recipe)} | describe_loading(stages.subject)
    return SearchStudy(open_storage(location.storage), location.name, recipe, identity)


def measure_front(
    trials: Sequence[Trial], recipe: Recipe, cache: DirectionCache, scorer: TrialScorer, location: StudyLocation
) -> list[FrontMember]:
    """Measure the members of the front with the recipe's verify steps, and return those that remain on the front.

    Raises UserError if no trial is feasible.
    """
    candidates = select_front(trials)
    if not candidates:
        raise UserError(
            f"search: none of {len(trials)} trials kept within all limits "
            f"({count_exceeded(scorer.measure_excess(t.scores) for t in trials)}); the trials are in the study "
            f"'{location.name}' of {location.storage or 'memory'}. Widen the space, or raise a limit"
        )
    members = [check_trial(trial, recipe, cache, scorer) for trial in thin_front(candidates, MAX_CHECKED)]
    excesses = [scorer.measure_excess(member.scores) for member in members]
    feasible = [m for m, excess in zip(members, excesses, strict=True) if all(over <= 0 for over in excess.values())]
    front = [feasible[i] for i in pareto_front([m.objectives for m in feasible])]
    if not front:
        raise UserError(
            f"search: in the check with longer answers, none of the {len(members)} members of the front kept within "
            f"all limits ({count_exceeded(excesses)}); make more trials, or raise a limit"
        )
    return sorted(front, key=lambda m: m.objectives)


def check_trial(trial: Trial, recipe: Recipe, cache: DirectionCache, scorer: TrialScorer) -> FrontMember:
    """Measure a trial's plan with the recipe's verify steps."""
    assert recipe.search is not None
    plan, subject = rebuild_plan(trial, recipe, cache), scorer.subject
    with applied(subject, plan):
        measurement = measure(subject, scorer.prompts, recipe.verify, scorer.before, base=subject, judge=scorer.judge)
    scores = {**trial.scores, **{name: score.value for name, score in measurement.scores.items()}}
    objectives = tuple(read_objective(name, scores) for name in scorer.minimize)
    return FrontMember(trial, apply_values(recipe, trial.values), plan, objectives, scores, measurement.records)


def thin_front(front: Sequence[Trial], most: int) -> list[Trial]:
    """Return at most this many trials, evenly spaced over the front and including both ends."""
    if len(front) <= most:
        return list(front)
    return [front[round(i * (len(front) - 1) / (most - 1))] for i in range(most)]


def pick_member(front: Sequence[FrontMember], pick: str) -> int:
    """Return the index of the chosen member. Raises UserError for a number beyond the front."""
    check_pick(pick)
    if pick == "balanced":
        return find_nearest_to_ideal([m.objectives for m in front])
    if pick in PICKS:
        return 0 if pick == "first" else len(front) - 1
    if int(pick) > len(front):
        raise UserError(f"--pick {pick}: the front has {len(front)} members; give 1 to {len(front)}")
    return int(pick) - 1


def check_pick(pick: str) -> None:
    """Raise UserError, before any trial, for a choice that no front can satisfy."""
    if pick == "knee":
        raise UserError("--pick knee is now called --pick balanced: the member nearest to the best of every objective")
    if pick not in PICKS and not (pick.isdigit() and int(pick) >= 1):
        raise UserError(f"--pick {pick}: give {', '.join(PICKS)}, or the number of a member of the front, from 1")


def describe_search(
    recipe: Recipe, location: StudyLocation, trials: Sequence[Trial], front: Sequence[FrontMember], picked: int
) -> dict[str, Any]:
    """Return the record of a search for run.json."""
    assert recipe.search is not None
    return {
        "study": location.name,
        "sampler": recipe.search.sampler,
        "trials": len(trials),
        "answered": sum(t.answered for t in trials),
        "seconds": round(sum(t.seconds for t in trials), 1),
        "picked": picked + 1,
        "front": [{"trial": m.trial.number, "values": m.trial.values, "scores": dict(m.scores)} for m in front],
    }


def set_trial_count(recipe: Recipe, trials: int) -> Recipe:
    """Return the recipe with this number of trials."""
    assert recipe.search is not None
    return recipe.model_copy(update={"search": recipe.search.model_copy(update={"trials": trials})})
