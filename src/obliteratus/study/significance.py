"""Which parts change a metric beyond chance, over all parts of a study together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from obliteratus.analyze.significance import contrast_within_pairs
from obliteratus.study.base import KnockoutResult
from obliteratus.study.ranking import damage_of, damage_of_change, no_change, rank_results

NEVER_NEGATIVE = frozenset({"kl.first_token"})  # no item's change is ever below zero, so its sign tells nothing


@dataclass(frozen=True)
class ChangedParts:
    """The parts that change one metric beyond chance: in at most 1 of 20 studies without any effect there is one."""

    worse: tuple[KnockoutResult, ...]
    """Parts that do damage, the most damaging first."""
    better: tuple[KnockoutResult, ...]
    """Parts whose loss improves the metric."""
    parts: int
    """Parts that were tested, without random controls."""
    items: int
    """Texts, prompts or questions that every part was measured on."""


def find_changed_parts(results: Sequence[KnockoutResult], metric: str) -> ChangedParts | None:
    """Test the changes of all parts together, item by item against the whole model.

    The limit for the largest |t| of all parts comes from sign flips of items, the same for every part (Westfall and
    Young 1993): a part without any effect changes an item one way as often as the other. With fewer than six items
    nothing can be beyond chance.

    Returns None where this cannot be tested: for `NEVER_NEGATIVE` metrics, and where a result holds no differences, as
    those of earlier versions do not.
    """
    parts = [r for r in rank_results(results, metric) if not r.control and metric in r.change]
    rows = [r.differences.get(metric, ()) for r in parts]
    if metric in NEVER_NEGATIVE or not all(rows) or len({len(row) for row in rows}) != 1:
        return None
    found = [parts[i] for i in contrast_within_pairs(torch.tensor(rows, dtype=torch.float64).T).significant]
    worse = sorted((r for r in found if damage_of(r, metric) > _none(metric)), key=lambda r: -damage_of(r, metric))
    better = tuple(r for r in found if damage_of(r, metric) < _none(metric))
    return ChangedParts(tuple(worse), better, len(parts), len(rows[0]))


def _none(metric: str) -> float:
    return damage_of_change(no_change(metric), metric)
