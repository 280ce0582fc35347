"""The loop over trials: draw values, plan, score, store. A trial is a live plan, so it loads and copies no weights."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from obliteratus.core.pareto import pareto_front
from obliteratus.core.progress import progress
from obliteratus.core.settings import Recipe
from obliteratus.core.types import Plan
from obliteratus.search.direction_cache import DirectionCache
from obliteratus.search.optuna_study import EXCESS, SearchStudy, make_suggester
from obliteratus.search.score import TrialScorer, TrialVerdict
from obliteratus.search.space import apply_values, decode_values, sample_values


@dataclass(frozen=True)
class Trial:
    """A finished trial."""

    number: int
    values: dict[str, Any]
    """Drawn values by path into the recipe."""
    objectives: tuple[float, ...]
    scores: dict[str, float]
    answered: bool
    """Whether its rates come from answers."""
    feasible: bool
    """Whether it keeps within those limits of the search that its scores say anything about."""
    seconds: float
    overestimate: float | None = None
    """By how much the estimated rate exceeds that of the answers; None without answers."""


def parse_trial(frozen: FrozenTrial, recipe: Recipe) -> Trial:
    """Convert Optuna's record of a finished trial."""
    assert recipe.search is not None
    space, attributes = recipe.search.space, frozen.user_attrs
    values = {path: decode_values(value, space[path]) for path, value in frozen.params.items()}
    return Trial(
        frozen.number,
        values,
        tuple(attributes["objectives"]),
        attributes["scores"],
        attributes["answered"],
        frozen.constraints[EXCESS] <= 0,
        attributes["seconds"],
        attributes["overestimate"],
    )


def run_trials(
    study: SearchStudy, recipe: Recipe, cache: DirectionCache, scorer: TrialScorer, trials: int
) -> list[Trial]:
    """Run trials until the study has ``trials`` of them, other processes' included, and return all finished ones."""
    with progress("SEARCH", trials) as advance:
        advance(len(study.finished))
        while (trial := study.ask(trials)) is not None:
            before = len(study.finished)
            with study.running(trial):
                run_trial(study, recipe, cache, scorer, trial)
            advance(len(study.finished) - before)
    return finished_trials(study, recipe)


def run_trial(
    study: SearchStudy, recipe: Recipe, cache: DirectionCache, scorer: TrialScorer, trial: optuna.Trial
) -> TrialVerdict:
    """Draw a trial's values, score its plan and store the result."""
    start = time.perf_counter()
    values = sample_values(recipe, make_suggester(trial))
    plan = cache.plan(apply_values(recipe, values))
    done = finished_trials(study, recipe)
    overestimates = [t.overestimate for t in done if t.overestimate is not None]
    verdict = scorer.score(plan, front_objectives(done), overestimates)
    attributes = {
        "scores": dict(verdict.scores),
        "objectives": scorer.objectives(verdict),  # not what the sampler is told, if there is a kl_target
        "answered": verdict.answered,
        "overestimate": verdict.overestimate,
        "seconds": round(time.perf_counter() - start, 3),
    }
    excess = max(scorer.measure_excess(verdict.scores).values())
    study.tell(trial, scorer.sampled_objectives(verdict), excess, attributes)
    return verdict


def finished_trials(study: SearchStudy, recipe: Recipe) -> list[Trial]:
    """Return the study's finished trials in order."""
    return [parse_trial(frozen, recipe) for frozen in study.finished]


def select_front(trials: Sequence[Trial]) -> list[Trial]:
    """Return the answered, feasible trials that no other such trial dominates, sorted by the first objective."""
    eligible = [t for t in trials if t.answered and t.feasible]
    return sorted((eligible[i] for i in pareto_front([t.objectives for t in eligible])), key=lambda t: t.objectives)


def front_objectives(trials: Sequence[Trial]) -> list[tuple[float, ...]]:
    """Return the objectives of `select_front`."""
    return [t.objectives for t in select_front(trials)]


def rebuild_plan(trial: Trial, recipe: Recipe, cache: DirectionCache) -> Plan:
    """Return the plan that the trial measured, bit for bit: the same values over the same directions."""
    return cache.plan(apply_values(recipe, trial.values))
