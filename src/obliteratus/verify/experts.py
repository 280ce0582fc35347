"""Which experts the target prompts draw on, with the uncertainty of that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from obliteratus.results import Score
from obliteratus.types import Activations, Routed
from obliteratus.verify.intervals import difference


@dataclass(frozen=True)
class Ranked:
    """How much more of the target prompts than of the control prompts an expert was given."""

    path: str
    expert: int
    excess: Score


def ranking(acts: Activations) -> tuple[Ranked, ...]:
    """All experts of all stacks, most drawn on by target prompts first, with Newcombe's 95 % interval.

    An interval that holds 0 says that routing does not tell the groups apart there.
    """
    found = [Ranked(path, e, _excess(g, e)) for path, g in acts.routed.items() for e in range(len(g["target"].count))]
    return tuple(sorted(found, key=lambda one: -one.excess.value))


def _excess(groups: Mapping[str, Routed], expert: int) -> Score:
    (a, n), (b, m) = ((int(groups[g].count[expert]), groups[g].prompts) for g in ("target", "control"))
    return difference(a, n, b, m)
