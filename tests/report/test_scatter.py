"""Points and ticks lie where they should, whatever the range."""

from __future__ import annotations

from itertools import pairwise

import pytest

from obliteratus.report.scatter import BOTTOM, LEFT, RIGHT, TOP, Point, choose_ticks, make_plot


def test_all_points_lie_inside_and_keep_their_order() -> None:
    plot = make_plot([Point(x, y, "trial", "") for x, y in ((0.0, 5.0), (0.5, 7.0), (1.0, -1.0))], ("x", "y"), "all")
    assert all(LEFT <= p.x <= RIGHT and TOP <= p.y <= BOTTOM for p in plot.points)
    a, b, c = plot.points
    assert a.x < b.x < c.x
    assert b.y < a.y < c.y  # upwards is less in an SVG


def test_intervals_lie_inside_too() -> None:
    plot = make_plot([Point(0.5, 0.1, "front", "", low=0.0, high=1.0), Point(0.4, 0.2, "trial", "")], ("x", "y"), "")
    point = plot.points[0]
    assert point.low is not None
    assert point.high is not None
    assert LEFT <= point.low < point.x < point.high <= RIGHT


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-0.02, 0.07), (3.0, 5000.0), (0.1, 0.1003), (-8.0, -2.0)])
def test_ticks_are_round_few_and_inside(low: float, high: float) -> None:
    ticks = choose_ticks(low, high)
    assert 2 <= len(ticks) <= 6
    assert all(low <= t <= high for t in ticks)
    steps = [b - a for a, b in pairwise(ticks)]
    assert steps == pytest.approx([steps[0]] * len(steps))
    assert f"{steps[0]:.1e}".split("e")[0] in ("1.0", "2.0", "2.5", "5.0")


def test_a_single_point_has_a_plot() -> None:
    plot = make_plot([Point(0.3, 0.3, "front", "")], ("x", "y"), "", percent=True)
    assert plot.x_ticks[0].text.endswith(" %")
    assert plot.line == ""
