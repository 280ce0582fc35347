"""The loop: ask, plan, judge, tell. A trial is a live plan, so it loads nothing and copies no weight."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from obliteratus.core.progress import progress
from obliteratus.core.settings import Recipe
from obliteratus.core.types import Plan
from obliteratus.search.front import pareto_front
from obliteratus.search.ground import DirectionCache
from obliteratus.search.judge import TrialJudge, TrialVerdict
from obliteratus.search.space import decode_values, sample_values, trial_recipe
from obliteratus.search.study import EXCESS, SearchStudy, suggest


@dataclass(frozen=True)
class Trial:
    """A finished trial, as the storage keeps it."""

    number: int
    values: dict[str, Any]
    """By path into the recipe."""
    objectives: tuple[float, ...]
    scores: dict[str, float]
    answered: bool
    feasible: bool
    seconds: float


def parse_trial(frozen: FrozenTrial, made: Recipe) -> Trial:
    """Optuna's record of a trial as ours."""
    assert made.search is not None
    assert frozen.values is not None, "a finished trial has values"
    space, known = made.search.space, frozen.user_attrs
    values = {path: decode_values(value, space[path]) for path, value in frozen.params.items()}
    return Trial(
        frozen.number,
        values,
        tuple(frozen.values),
        known["scores"],
        known["answered"],
        frozen.constraints[EXCESS] <= 0,
        known["seconds"],
    )


def run_trials(study: SearchStudy, made: Recipe, ground: DirectionCache, judge: TrialJudge, trials: int) -> list[Trial]:
    """Trials until the study has ``trials`` of them, other processes' included; returns all finished ones."""
    with progress("SEARCH", trials) as advance:
        advance(len(study.done))
        while (begun := study.ask(trials)) is not None:
            before = len(study.done)
            with study.at(begun):
                run_trial(study, made, ground, judge, begun)
            advance(len(study.done) - before)
    return finished_trials(study, made)


def run_trial(
    study: SearchStudy, made: Recipe, ground: DirectionCache, judge: TrialJudge, begun: optuna.Trial
) -> TrialVerdict:
    """One trial from its values to its scores."""
    start = time.perf_counter()
    values = sample_values(made, suggest(begun))
    plan = ground.plan(trial_recipe(made, values))
    verdict = judge.judged(plan, front_of(finished_trials(study, made)))
    known = {
        "scores": dict(verdict.scores),
        "answered": verdict.answered,
        "seconds": round(time.perf_counter() - start, 3),
    }
    study.tell(begun, judge.objectives(verdict), judge.excess(verdict.scores), known)
    return verdict


def finished_trials(study: SearchStudy, made: Recipe) -> list[Trial]:
    """All trials that are done, in order."""
    return [parse_trial(frozen, made) for frozen in study.done]


def front_of(trials: Sequence[Trial]) -> list[tuple[float, ...]]:
    """Objectives of the best trials: answered, feasible, and dominated by no other such."""
    return [t.objectives for t in front_trials(trials)]


def front_trials(trials: Sequence[Trial]) -> list[Trial]:
    """The trials of `front_of`, fewest of the first objective first."""
    good = [t for t in trials if t.answered and t.feasible]
    return sorted((good[i] for i in pareto_front([t.objectives for t in good])), key=lambda t: t.objectives)


def trial_plan(trial: Trial, made: Recipe, ground: DirectionCache) -> Plan:
    """The plan that a trial measured, to the bit: the same values over the same directions."""
    return ground.plan(trial_recipe(made, trial.values))
