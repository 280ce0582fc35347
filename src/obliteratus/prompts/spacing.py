"""Choose some of many prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def evenly_spaced(n: int, most: int) -> list[int]:
    """Return at most ``most`` of n indices, evenly spaced from 0, since prompts often come sorted by topic."""
    return [i * n // most for i in range(most)] if n > most else list(range(n))


def pick_evenly(items: Sequence[T], most: int) -> list[T]:
    """Return the items at these indices."""
    return [items[i] for i in evenly_spaced(len(items), most)]
