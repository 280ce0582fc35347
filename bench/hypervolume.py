"""The volume that a front dominates: one number for how good it is, in two or three objectives."""

from __future__ import annotations

import math
from collections.abc import Sequence

from obliteratus.core.errors import UserError
from obliteratus.search.pareto import Point

DIMENSIONS = (2, 3)  # beyond three the sweep below is no longer the way, and no front here has more


def hypervolume(points: Sequence[Point], reference: Point) -> float:
    """Exact volume of what is dominated by at least one of the points and dominates the reference, all to be small.

    points: 2 or 3 coordinates each, in any order, dominated ones and repetitions too: they add nothing. Those that are
    not better than the reference everywhere add nothing either. 0 for none. The unit is the product of the
    coordinates' units. Source: Zitzler and Thiele 1998; the sweep over the last coordinate as in Fonseca, Paquete and
    López-Ibáñez 2006. UserError for another number of coordinates, or one that is not a number.
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
    """Strips from left to right, each as high as the lowest point so far leaves it."""
    total, floor = 0.0, reference[1]
    for x, y in sorted((p[0], p[1]) for p in points):
        if y < floor:
            total += (reference[0] - x) * (floor - y)
            floor = y
    return total


def _volume(points: Sequence[Point], reference: Point) -> float:
    """Slabs along the last coordinate; within one the cross-section is that of all points up to it."""
    levels = sorted({p[2] for p in points})
    seen: list[tuple[float, ...]] = []
    total = 0.0
    for low, high in zip(levels, [*levels, reference[2]][1:], strict=True):
        seen += [tuple(p[:2]) for p in points if p[2] == low]
        total += _area(seen, reference[:2]) * (high - low)
    return total
