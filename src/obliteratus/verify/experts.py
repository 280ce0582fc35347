"""Which experts the target prompts draw on, with the uncertainty of that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt

from obliteratus.core.results import Score
from obliteratus.core.types import Activations, Routed
from obliteratus.verify.intervals import Z


@dataclass(frozen=True)
class ExpertRank:
    """How much more of a target prompt's tokens than of a control prompt's an expert is given."""

    path: str
    expert: int
    excess: Score


def rank_experts(acts: Activations) -> tuple[ExpertRank, ...]:
    """All experts of all stacks, most drawn on by target prompts first, with Welch's 95 % interval over prompts.

    Prompts are what is drawn: tokens of one prompt go to like experts. An interval that holds 0 says that routing does
    not tell the groups apart there.
    """
    found = [
        ExpertRank(path, e, _excess(g, e)) for path, g in acts.routed.items() for e in range(len(g["target"].share))
    ]
    return tuple(sorted(found, key=lambda one: -one.excess.value))


def _excess(groups: Mapping[str, Routed], expert: int) -> Score:
    target, control = (groups[g] for g in ("target", "control"))
    value = float(target.share[expert] - control.share[expert])
    error = sqrt(sum(float(g.variance[expert]) / g.prompts for g in (target, control)))
    return Score(
        value=value, low=value - Z * error, high=value + Z * error, n=target.prompts + control.prompts, unit="share"
    )
