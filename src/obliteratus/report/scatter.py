"""Scatter plots as data for a template: points, ticks and a line in the coordinates of an SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 640, 360  # units of the picture, about a pixel each on a wide page
LEFT, RIGHT, TOP, BOTTOM = 56, 620, 28, 316  # of the area of points within it
MARGIN = 0.04  # of the range, so that no point lies on the frame
TICKS = 5
STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)  # the leading digits of a step between ticks that people can count by
RADIUS, LARGE = 4.0, 7.0


@dataclass(frozen=True)
class Point:
    """A point with its looks."""

    x: float
    y: float
    kind: str
    """A class of the stylesheet: trial, answered, front, chosen or base."""
    text: str
    """Shown when it is pointed at."""
    link: str = ""
    low: float | None = None
    """Ends of its interval along x."""
    high: float | None = None
    r: float = RADIUS


@dataclass(frozen=True)
class Tick:
    """A position on an axis, and its label."""

    at: float
    text: str


@dataclass(frozen=True)
class Plot:
    """All that the template draws."""

    label: str
    x_name: str
    y_name: str
    points: tuple[Point, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    line: str
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = RIGHT
    top: int = TOP
    bottom: int = BOTTOM


def make_plot(
    points: Sequence[Point], names: tuple[str, str], label: str, line: Sequence[Point] = (), percent: bool = False
) -> Plot:
    """Return the plot of the points. line: points to connect, in their order. percent: whether x is a share."""
    xs = [v for p in points for v in (p.x, p.low, p.high) if v is not None]
    x_ends, y_ends = _ends(xs), _ends([p.y for p in points])

    def place(x: float) -> float:
        return round(LEFT + (x - x_ends[0]) / (x_ends[1] - x_ends[0]) * (RIGHT - LEFT), 1)

    def lift(y: float) -> float:
        return round(BOTTOM - (y - y_ends[0]) / (y_ends[1] - y_ends[0]) * (BOTTOM - TOP), 1)

    drawn = tuple(
        Point(
            place(p.x), lift(p.y), p.kind, p.text, p.link,
            None if p.low is None else place(p.low), None if p.high is None else place(p.high), p.r,
        )
        for p in points
    )  # fmt: skip
    x_ticks = tuple(Tick(place(v), f"{100 * v:g} %" if percent else f"{v:g}") for v in choose_ticks(*x_ends))
    y_ticks = tuple(Tick(lift(v), f"{v:g}") for v in choose_ticks(*y_ends))
    connected = " ".join(f"{place(p.x)},{lift(p.y)}" for p in line)
    return Plot(label, *names, drawn, x_ticks, y_ticks, connected)


def _ends(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = MARGIN * (high - low) or 0.5
    return low - room, high + room


def choose_ticks(low: float, high: float) -> list[float]:
    """Return round numbers within the range, about `TICKS` of them."""
    rough = (high - low) / TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * s for s in STEPS if power * s >= rough)
    return [round(i * step, 10) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
