"""What counts as damage, and results in the order of it."""

from __future__ import annotations

import math
from collections.abc import Iterable

from obliteratus.core.errors import UserError, unknown_name
from obliteratus.core.results import Score
from obliteratus.study.base import KnockoutResult
from obliteratus.verify.behavior import RARE_SHARES, is_rare

# Shares of answers that say nothing about the behavior; their names are those of behavior scores otherwise.
OTHER_SHARES = frozenset({*RARE_SHARES, "degenerate"})
RATIOS = frozenset({"perplexity"})  # changes are ratios (1: no change); of all others they are differences (0)


def is_falling(metric: str) -> bool:
    """Return whether damage is a fall of this score: of accuracy, or of the behavior's rate on target prompts."""
    name, _, group = metric.partition(".")
    return metric == "accuracy" or (group == "target" and name not in OTHER_SHARES)


def name_effect(metric: str) -> str:
    """Return what a change for the worse is called: of the behavior's rate on target prompts it is no damage."""
    return "effect" if is_falling(metric) and metric != "accuracy" else "damage"


def knockout_results(results: Iterable[KnockoutResult]) -> list[KnockoutResult]:
    """Return all results but the baseline."""
    return [r for r in results if r.strategy]


def baseline_result(results: Iterable[KnockoutResult]) -> KnockoutResult:
    """Return the whole model's result, with which every study begins."""
    return next(r for r in results if not r.strategy)


def metric_names(results: Iterable[KnockoutResult]) -> list[str]:
    """Return the names of all changes in the study's order, or of the scores if there is only a baseline.

    Left out are `RARE_SHARES` that are 0 throughout.
    """
    results = list(results)
    changes = dict.fromkeys(name for r in results for name in r.change)
    names = list(changes or dict.fromkeys(name for r in results for name in r.scores))
    return [name for name in names if not (is_rare(name) and _is_zero(name, results))]


def _is_zero(metric: str, results: Iterable[KnockoutResult]) -> bool:
    return all(r.scores[metric].value == 0 for r in results if metric in r.scores)


def ordering_metric(results: Iterable[KnockoutResult], by: str = "") -> str:
    """Return the metric that orders tables: ``by``, or else the study's first. Raises UserError for an unknown one."""
    names = metric_names(results)
    if by and by not in names:
        raise UserError(unknown_name("metric", by, names))
    return by or names[0]


def no_change(metric: str) -> float:
    """Return the change of a part without any effect."""
    return 1.0 if metric in RATIOS else 0.0


def damage_of_change(change: float, metric: str) -> float:
    """Return a change in the direction of damage: the larger, the worse, and 0 is none. Ratios become logarithms.

    NaN counts as infinite damage, because the model is broken.
    """
    if math.isnan(change):
        return math.inf
    if metric in RATIOS:
        return math.log(change) if change > 0 else -math.inf
    return -change if is_falling(metric) else change


def change_of_damage(damage: float, metric: str) -> float:
    """Return the change that does so much damage: the inverse of `damage_of_change` for finite values."""
    if metric in RATIOS:
        return math.exp(damage)
    return -damage if is_falling(metric) else damage


def damage_of(result: KnockoutResult, metric: str) -> float:
    """Return how much worse the model is without the part; −∞ if this metric was not measured."""
    change = result.change.get(metric)
    return -math.inf if change is None else damage_of_change(change.value, metric)


def rank_results(results: Iterable[KnockoutResult], metric: str) -> list[KnockoutResult]:
    """Return all knockouts, the most damaging first; equal ones by position, since workers finish in any order."""
    return sorted(
        knockout_results(results), key=lambda r: (-damage_of(r, metric), r.control, r.layer, r.part, r.component)
    )


def is_clear_damage(change: Score, metric: str) -> bool:
    """Return whether the whole 95 % interval lies on the side of damage; not where there is no interval.

    The interval is that of one part by itself. Of many parts without any effect, 1 in 40 is expected to show damage.
    """
    if math.isnan(change.low) and not math.isnan(change.value):
        return False
    return min(damage_of_change(change.low, metric), damage_of_change(change.high, metric)) > 0
