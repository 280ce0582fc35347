"""What counts as damage, and results in its order."""

from __future__ import annotations

import math
from collections.abc import Iterable

from obliteratus.core.errors import UserError
from obliteratus.core.registry import unknown_name
from obliteratus.core.results import Score
from obliteratus.study.base import KnockoutResult

FALLS = frozenset({"refusal.target", "accuracy"})  # damage is a fall of these; of all others a rise
RATIOS = frozenset({"perplexity"})  # changes are ratios, 1 is none; of all others differences, 0 is none


def knocked(results: Iterable[KnockoutResult]) -> list[KnockoutResult]:
    """All but the baseline."""
    return [r for r in results if r.strategy]


def baseline(results: Iterable[KnockoutResult]) -> KnockoutResult:
    """The whole model's result, which every study begins with."""
    return next(r for r in results if not r.strategy)


def metrics(results: Iterable[KnockoutResult]) -> list[str]:
    """Names of all changes, in the order in which the study has them; of a study's baseline alone, its scores."""
    found = list(results)
    changes = dict.fromkeys(name for r in found for name in r.change)
    return list(changes or dict.fromkeys(name for r in found for name in r.scores))


def metric_of(results: Iterable[KnockoutResult], by: str = "") -> str:
    """The metric that orders tables: ``by``, or the study's first. UserError for one that nothing was measured by."""
    names = metrics(results)
    if by and by not in names:
        raise UserError(unknown_name("metric", by, names))
    return by or names[0]


def none(metric: str) -> float:
    """The change of a part that nothing hangs on."""
    return 1.0 if metric in RATIOS else 0.0


def harm(value: float, metric: str) -> float:
    """A change in the direction of damage: the larger, the worse; 0 is none. Ratios as logarithms (nats a token).

    What is no number counts as infinite: the model broke.
    """
    if math.isnan(value):
        return math.inf
    if metric in RATIOS:
        return math.log(value) if value > 0 else -math.inf
    return -value if metric in FALLS else value


def value_of(harmful: float, metric: str) -> float:
    """The change that does so much harm: what `harm` makes a finite one of."""
    if metric in RATIOS:
        return math.exp(harmful)
    return -harmful if metric in FALLS else harmful


def damage(result: KnockoutResult, metric: str) -> float:
    """How much worse the model is without the part; −∞ where this was not measured."""
    change = result.change.get(metric)
    return -math.inf if change is None else harm(change.value, metric)


def ranked(results: Iterable[KnockoutResult], metric: str) -> list[KnockoutResult]:
    """Knocked-out parts, the most damaging first. Equal ones by their place, since workers end in any order."""
    return sorted(knocked(results), key=lambda r: (-damage(r, metric), r.control, r.layer, r.part, r.component))


def clear(change: Score, metric: str) -> bool:
    """Whether the interval leaves 'no change' out, on the side of damage."""
    return min(harm(change.low, metric), harm(change.high, metric)) > 0
