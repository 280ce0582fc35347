"""The volume that a front dominates, against counting by chance and against what it must obey."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
from bench.hypervolume import hypervolume
from hypothesis import given, settings
from hypothesis import strategies as st

from obliteratus.core.errors import UserError
from obliteratus.core.pareto import Point, dominates, pareto_front

coordinate = st.integers(0, 12).map(lambda n: n / 10)  # a coarse grid, so that ties are drawn; some beyond 1
UNIT = {2: (1.0, 1.0), 3: (1.0, 1.0, 1.0)}


def fronts(most: int = 7) -> st.SearchStrategy[list[tuple[float, ...]]]:
    return st.sampled_from([2, 3]).flatmap(
        lambda d: st.lists(st.tuples(*[coordinate] * d), min_size=1, max_size=most).map(
            lambda ps: [tuple(p) for p in ps]
        )
    )


def by_inclusion(points: list[tuple[float, ...]], reference: Point) -> float:
    """Inclusion and exclusion over all subsets: the definition of the volume of a union of boxes."""
    total = 0.0
    for k in range(1, len(points) + 1):
        for some in combinations(points, k):
            worst = [max(axis) for axis in zip(*some, strict=True)]
            total -= (-1) ** k * math.prod(max(0.0, r - x) for x, r in zip(worst, reference, strict=True))
    return total


@given(fronts())
@settings(max_examples=150, deadline=None)
def test_it_is_the_volume_of_the_union_of_boxes(points: list[tuple[float, ...]]) -> None:
    reference = UNIT[len(points[0])]
    assert hypervolume(points, reference) == pytest.approx(by_inclusion(points, reference), abs=1e-9)


@pytest.mark.parametrize("d", [2, 3])
def test_it_is_what_chance_counts(d: int) -> None:
    """200 000 draws: a standard error of at most 0.0012, and four of them."""
    generator = torch.Generator().manual_seed(d)
    points = torch.rand(12, d, generator=generator, dtype=torch.float64)
    draws = torch.rand(200_000, d, generator=generator, dtype=torch.float64)
    share = (points[:, None] <= draws[None]).all(-1).any(0).double().mean().item()
    found = hypervolume(points.tolist(), UNIT[d])
    assert found == pytest.approx(share, abs=4 * 0.5 / math.sqrt(len(draws)))
    assert hypervolume(points[:1].tolist(), UNIT[d]) < share - 0.05  # control: one point of them is not enough


@given(fronts())
@settings(max_examples=100, deadline=None)
def test_order_repetition_and_dominated_points_do_not_count(points: list[tuple[float, ...]]) -> None:
    reference = UNIT[len(points[0])]
    whole = hypervolume(points, reference)
    assert hypervolume([*reversed(points), points[0]], reference) == pytest.approx(whole, abs=1e-12)
    assert hypervolume([points[i] for i in pareto_front(points)], reference) == pytest.approx(whole, abs=1e-12)


@given(fronts(), st.data())
@settings(max_examples=100, deadline=None)
def test_a_new_point_adds_exactly_when_nothing_is_as_good(points: list[tuple[float, ...]], data: st.DataObject) -> None:
    d = len(points[0])
    new = data.draw(st.tuples(*[coordinate] * d))
    inside = all(x < 1 for x in new)
    beaten = any(p == new or dominates(p, new) for p in points)
    gain = hypervolume([*points, new], UNIT[d]) - hypervolume(points, UNIT[d])
    assert (gain > 1e-9) == (inside and not beaten)
    assert gain >= -1e-12


@given(fronts(), st.floats(0.1, 10), st.floats(-5, 5))
@settings(max_examples=60, deadline=None)
def test_it_scales_and_does_not_move(points: list[tuple[float, ...]], scale: float, shift: float) -> None:
    d = len(points[0])
    moved = [tuple(scale * x + shift for x in p) for p in points]
    expected = scale**d * hypervolume(points, UNIT[d])
    assert hypervolume(moved, [scale + shift] * d) == pytest.approx(expected, rel=1e-6, abs=1e-6)


@given(fronts())
@settings(max_examples=60, deadline=None)
def test_a_constant_third_coordinate_is_a_thickness(points: list[tuple[float, ...]]) -> None:
    flat = [p[:2] for p in points]
    thick = hypervolume([(*p, 0.25) for p in flat], UNIT[3])
    assert thick == pytest.approx(0.75 * hypervolume(flat, UNIT[2]), abs=1e-12)


def test_known_values() -> None:
    assert hypervolume([], (1.0, 1.0)) == 0
    assert hypervolume([(0.0, 0.0)], (1.0, 1.0)) == 1
    assert hypervolume([(1.0, 0.0), (0.0, 1.0), (2.0, -3.0)], (1.0, 1.0)) == 0  # on the edge, or beyond it
    assert hypervolume([(0.0, 0.5), (0.5, 0.0)], (1.0, 1.0)) == pytest.approx(0.75)
    assert hypervolume([(0.0, 0.5, 0.5), (0.5, 0.0, 0.5), (0.5, 0.5, 0.0)], (1.0, 1.0, 1.0)) == pytest.approx(0.5)
    assert hypervolume([(0.5, math.inf)], (1.0, 1.0)) == 0


@pytest.mark.parametrize(
    ("points", "reference", "says"),
    [
        ([(0.0,)], (1.0,), "give 2 or 3"),
        ([(0.0,) * 4], (1.0,) * 4, "give 2 or 3"),
        ([(0.0, 0.0)], (1.0, 1.0, 1.0), "all alike"),
        ([(math.nan, 0.0)], (1.0, 1.0), "not a number"),
        ([(-math.inf, 0.0)], (1.0, 1.0), "−∞"),
    ],
)
def test_what_it_does_not_measure(points: list[Point], reference: Point, says: str) -> None:
    with pytest.raises(UserError, match=says):
        hypervolume(points, reference)
