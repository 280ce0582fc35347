"""Pareto fronts of points whose coordinates are all minimized."""

from __future__ import annotations

import math
from collections.abc import Sequence

Point = Sequence[float]

# Members of a search's front that get the longer check, which costs about ten trials' time each. A front seldom has
# more; of a larger one, the ends and even steps between them say as much.
MAX_CHECKED = 10


def dominates(a: Point, b: Point) -> bool:
    """Whether ``a`` is nowhere worse than ``b`` and somewhere better."""
    pairs = list(zip(a, b, strict=True))
    return all(x <= y for x, y in pairs) and any(x < y for x, y in pairs)


def pareto_front(points: Sequence[Point]) -> list[int]:
    """Return the indices of the points that no other dominates. Of equal points only the first is returned."""
    seen = [tuple(p) for p in points]
    return [i for i, p in enumerate(seen) if p not in seen[:i] and not any(dominates(other, p) for other in points)]


def find_nearest_to_ideal(points: Sequence[Point]) -> int:
    """Return the index of the point nearest to the ideal one, which has the best value of every coordinate.

    Coordinates are scaled to 0–1 over the points, and distances are Euclidean.
    """
    low, high = ([bound(axis) for axis in zip(*points, strict=True)] for bound in (min, max))

    def distance(p: Point) -> float:
        return math.hypot(*((x - a) / ((b - a) or 1.0) for x, a, b in zip(p, low, high, strict=True)))

    return min(range(len(points)), key=lambda i: distance(points[i]))
