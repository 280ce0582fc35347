"""The hypervolume: one number for how good a Pareto front is, in two or three objectives."""

from __future__ import annotations

import math
from collections.abc import Sequence

from obliteratus.core.errors import UserError
from obliteratus.core.pareto import Point

DIMENSIONS = (2, 3)  # the sweep below is inefficient beyond three, and no front here has more


def hypervolume(points: Sequence[Point], reference: Point) -> float:
    """Return the exact volume between the points and the reference, where all coordinates are minimized.

    points: 2 or 3 coordinates each, in any order. Dominated points, repetitions, and points that are not better than
    the reference everywhere add nothing. The unit is the product of the coordinates' units. Source: Zitzler and Thiele
    1998; the sweep over the last coordinate is that of Fonseca, Paquete and López-Ibáñez 2006.
    Raises UserError for another number of coordinates, and for NaN or −∞.
    """
    _check(points, reference)
    inside = [tuple(p) for p in points if all(x < r for x, r in zip(p, reference, strict=True))]
    return _area(inside, reference) if len(reference) == 2 else _volume(inside, reference)


def _check(points: Sequence[Point], reference: Point) -> None:
    sizes = {len(p) for p in (*points, reference)}
    if len(sizes) > 1 or not sizes <= set(DIMENSIONS):
        raise UserError(f"hypervolume: points and reference have {sorted(sizes)} coordinates; give 2 or 3, all alike")
    if any(math.isnan(x) or x == -math.inf for p in (*points, reference) for x in p):
        raise UserError("hypervolume: a coordinate is not a number or −∞; leave out points that were not measured")


def _area(points: Sequence[Point], reference: Point) -> float:
    """Sum strips from left to right, each as high as the lowest point so far leaves it."""
    total, floor = 0.0, reference[1]
    for x, y in sorted((p[0], p[1]) for p in points):
        if y < floor:
            total += (reference[0] - x) * (floor - y)
            floor = y
    return total


def _volume(points: Sequence[Point], reference: Point) -> float:
    """Sum slabs along the last coordinate; the cross-section of each is the area of all points up to it."""
    levels = sorted({p[2] for p in points})
    seen: list[tuple[float, ...]] = []
    total = 0.0
    for low, high in zip(levels, [*levels, reference[2]][1:], strict=True):
        seen += [tuple(p[:2]) for p in points if p[2] == low]
        total += _area(seen, reference[:2]) * (high - low)
    return total
