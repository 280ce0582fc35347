"""Shares of answers by side, and how each side differs from the first, prompt by prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from obliteratus.compare.sides import SideAnswers
from obliteratus.core.results import Score
from obliteratus.judge.judge import Verdict
from obliteratus.verify.behavior import COUNTED, is_rare
from obliteratus.verify.intervals import paired_share_change, wilson_rate

KINDS = ("behavior", "degenerate", "partial")
"""The shares of `COUNTED` that are compared. Rare ones are left out if no side has any."""


@dataclass(frozen=True)
class SharesOfSides:
    """A share of answers, of each side."""

    name: str
    """Such as ``refusal.target``."""
    rates: tuple[Score, ...]
    changes: tuple[Score, ...]
    """Of each later side against the first, paired."""


def compare_sides(sides: Sequence[SideAnswers]) -> list[SharesOfSides]:
    """Return each share with its interval by side, and the paired differences to the first side."""
    return [shares for name, group, counted in _list_shares(sides) for shares in _compare(sides, name, group, counted)]


def _list_shares(sides: Sequence[SideAnswers]) -> Iterator[tuple[str, str, tuple[Verdict, ...]]]:
    groups = dict.fromkeys(group for group, _ in sides[0].answers)
    for kind in KINDS:
        for group in groups:
            yield f"{sides[0].behavior if kind == 'behavior' else kind}.{group}", group, COUNTED[kind]


def _compare(
    sides: Sequence[SideAnswers], name: str, group: str, counted: tuple[Verdict, ...]
) -> Iterator[SharesOfSides]:
    keys = [key for key in sides[0].answers if key[0] == group]
    hits = [torch.tensor([float(s.answers[key]["verdict"] in counted) for key in keys]) for s in sides]
    if is_rare(name) and not any(bool(h.any()) for h in hits):
        return
    rates = tuple(wilson_rate(int(h.sum()), len(h)) for h in hits)
    yield SharesOfSides(name, rates, tuple(paired_share_change(h, hits[0]) for h in hits[1:]))


def describe_comparison(sides: Sequence[SideAnswers], shares: Sequence[SharesOfSides]) -> str:
    """Return one sentence on the behavior's rate on target prompts, and which sides differ from the first."""
    found = next(s for s in shares if s.name.endswith(".target"))
    verb = "refuses" if sides[0].behavior == "refusal" else f"shows {sides[0].behavior} on"
    n = found.rates[0].n
    parts = [
        f"{s.name} {verb} {round(r.value * n)} of {n} target prompts" for s, r in zip(sides, found.rates, strict=True)
    ]
    return f"{'; '.join(parts)}. {_describe_changes(sides, found)}"


def _describe_changes(sides: Sequence[SideAnswers], found: SharesOfSides) -> str:
    said = []
    for side, change in zip(sides[1:], found.changes, strict=True):
        points = f"{100 * change.value:+.1f} points, {100 * change.low:+.1f} to {100 * change.high:+.1f}"
        beyond = not change.low <= 0 <= change.high
        said.append(f"{side.name} {'differs' if beyond else 'does not differ beyond chance'} ({points})")
    return f"From {sides[0].name}, {'; '.join(said)}.".replace("-", "−") if said else ""
