"""Cohen's kappa by its definition, apart from the program's own."""

from __future__ import annotations

from collections.abc import Sequence


def kappa(said: Sequence[bool], labels: Sequence[bool]) -> float:
    """Agreement beyond what the two rates alone would give."""
    n = len(said)
    agree = sum(a == b for a, b in zip(said, labels, strict=True)) / n
    chance = sum(said) / n * sum(labels) / n + (1 - sum(said) / n) * (1 - sum(labels) / n)
    return (agree - chance) / (1 - chance)
