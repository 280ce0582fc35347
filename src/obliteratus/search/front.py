"""Pareto fronts of points that are to be small in every coordinate."""

from __future__ import annotations

import math
from collections.abc import Sequence

Point = Sequence[float]


def dominates(a: Point, b: Point) -> bool:
    """Whether ``a`` is nowhere worse than ``b``, and somewhere better."""
    pairs = list(zip(a, b, strict=True))
    return all(x <= y for x, y in pairs) and any(x < y for x, y in pairs)


def pareto_front(points: Sequence[Point]) -> list[int]:
    """Indices of the points that no other dominates; of equal points the first."""
    seen = [tuple(p) for p in points]
    return [i for i, p in enumerate(seen) if p not in seen[:i] and not any(dominates(other, p) for other in points)]


def nearest_to_ideal(points: Sequence[Point]) -> int:
    """Index of the front's member nearest to the best value of every objective, all scaled to 0–1 over the front."""
    low, high = ([edge(axis) for axis in zip(*points, strict=True)] for edge in (min, max))

    def far(p: Point) -> float:
        return math.hypot(*((x - a) / ((b - a) or 1.0) for x, a, b in zip(p, low, high, strict=True)))

    return min(range(len(points)), key=lambda i: far(points[i]))
