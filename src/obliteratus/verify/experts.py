"""Which experts target prompts are routed to more than control prompts, with confidence intervals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import nan, sqrt

from obliteratus.core.results import Score
from obliteratus.core.types import Activations, RoutingStatistics
from obliteratus.verify.intervals import LEAST, student_quantile


@dataclass(frozen=True)
class ExpertRank:
    """By how much an expert's share of a target prompt's tokens exceeds its share of a control prompt's."""

    path: str
    expert: int
    excess: Score


def rank_experts(acts: Activations) -> tuple[ExpertRank, ...]:
    """Return all experts of all layers by falling excess on target prompts, with Welch's 95 % interval over prompts.

    The sampling unit is the prompt, because tokens of one prompt go to similar experts. If an interval contains 0, the
    groups are not routed differently there.
    """
    ranks = [
        ExpertRank(path, e, _excess(g, e)) for path, g in acts.routed.items() for e in range(len(g["target"].share))
    ]
    return tuple(sorted(ranks, key=lambda rank: -rank.excess.value))


def _excess(groups: Mapping[str, RoutingStatistics], expert: int) -> Score:
    target, control = (groups[g] for g in ("target", "control"))
    value = float(target.share[expert] - control.share[expert])
    parts = [float(g.variance[expert]) / g.prompts for g in (target, control)]
    n = target.prompts + control.prompts
    if min(target.prompts, control.prompts) < LEAST or not sum(parts):
        return Score(value=value, low=nan, high=nan, n=n, unit="share")
    freedom = sum(parts) ** 2 / sum(x * x / (g.prompts - 1) for x, g in zip(parts, (target, control), strict=True))
    half = student_quantile(freedom) * sqrt(sum(parts))
    return Score(value=value, low=value - half, high=value + half, n=n, unit="share")
