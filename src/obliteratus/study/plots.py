"""A study's pictures: bars with intervals, a map of blocks, grids of heads and experts, the embeddings by chunks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from obliteratus.core.results import Score
from obliteratus.report.curves import BLUE, GREEN, GREY, ORANGE, Axes, Figure, add_legend
from obliteratus.study.base import KnockoutResult
from obliteratus.study.maps import averaged, blocks, grid
from obliteratus.study.ranking import RATIOS, clear, damage, harm, knocked, none, ranked, value_of
from obliteratus.study.tables import called, scale, unit

BARS = 24  # parts whose names stay legible in one picture
CHANCE = 6  # of those drawn at random: the worst are enough to see what chance does
ROW, EDGE = 0.26, 1.3  # inches: of a bar, and of title and axis together
WIDE = 9.0  # inches, as all pictures of this program's pages
BROKEN = 1.15  # × the longest finite bar: where one without end is cut
DECADES = 5.0  # from this ratio between the ends of an axis on, it is logarithmic
GRIDS = {"heads": "head", "experts": "expert"}
STRIP = "embeddings"
COLOURS = (BLUE, ORANGE, GREEN, "#CC79A7", "#56B4E9", "#E69F00")  # of studies side by side (Okabe and Ito)


@dataclass(frozen=True)
class Picture:
    """Something that can be drawn."""

    draw: Callable[[Figure], None]
    size: tuple[float, float]
    """Inches."""


def pictures(results: Sequence[KnockoutResult], metric: str) -> dict[str, Picture]:
    """All that the study has something for, by names that files can bear."""
    taken = [r for r in knocked(results) if metric in r.change]
    made: dict[str, Picture] = {}
    if shown := barred(taken, metric):
        size = (WIDE, EDGE + ROW * len(shown))
        made["impact"] = Picture(partial(bars, shown=shown, metric=metric), size)
    if rows := averaged(taken, metric):
        size = (WIDE, EDGE + 0.5 * len(rows))  # inches a row: numbers fit in
        made["blocks"] = Picture(partial(blocks, rows=rows, metric=metric), size)
    for kind, name in GRIDS.items():
        parts = [r for r in taken if r.strategy == kind and r.part >= 0]
        if len({r.part for r in parts}) > 1:
            size = (
                WIDE,
                EDGE + min(8.0, 0.22 * (1 + max(r.part for r in parts))),
            )  # inches: a page, a row with its tick
            draw = partial(grid, parts=parts, metric=metric, name=name)
            made[kind] = Picture(draw, size)
    if chunks := [r for r in taken if r.strategy == STRIP]:
        made[STRIP] = Picture(partial(strip, chunks=chunks, metric=metric), (WIDE, 3.2))
    return made


# ------------------------------------------------------------------------------------------------ bars
def barred(taken: Sequence[KnockoutResult], metric: str) -> list[KnockoutResult]:
    """The parts that have a bar, the most damaging first: parts, and a few controls for comparison."""
    ordered = [r for r in ranked(taken, metric) if metric in r.change]
    parts = {r.component for r in [r for r in ordered if not r.control][:BARS]}
    chance = {r.component for r in [r for r in ordered if r.control][:CHANCE]}
    return [r for r in ordered if r.component in parts | chance]


def bars(figure: Figure, shown: Sequence[KnockoutResult], metric: str) -> None:
    """A bar for each part from 'no change' on, the worst at the top; 95 % intervals; those drawn at random in grey."""
    axes = figure.add_subplot(xlabel=f"{metric}, {unit(metric)}; lines: 95 % intervals")
    drawn = on_axis([r.change[metric] for r in shown], metric)
    start = none(metric)
    for colour, label in ((ORANGE, "damage only"), (BLUE, "interval reaches no damage"), (GREY, "drawn at random")):
        rows = [i for i, r in enumerate(shown) if _colour(r, metric) == colour]
        if rows:
            axes.barh(rows, [drawn[i].value - start for i in rows], left=start, color=colour, label=label, height=0.7)
    for i, one in enumerate(drawn):
        axes.plot([one.low, one.high], [i, i], color="black", lw=1)
        if one.broken:
            axes.annotate(" ∞", (one.value, i), va="center")
    axes.axvline(start, color="black", lw=0.8)
    axes.set_yticks(range(len(shown)), [called(r) for r in shown], fontsize="small")
    axes.set_ylim(len(shown) - 0.4, -0.6)
    scaled(axes, "x", drawn, metric)
    figure.suptitle(f"Change in {metric} when a part is knocked out, the most damaging first")
    add_legend(axes, 3)


def _colour(result: KnockoutResult, metric: str) -> str:
    if result.control:
        return GREY
    return ORANGE if clear(result.change[metric], metric) else BLUE


def strip(figure: Figure, chunks: Sequence[KnockoutResult], metric: str) -> None:
    """The embeddings' chunks in their order, each with its interval."""
    ordered = sorted(chunks, key=lambda r: r.part)
    axes = figure.add_subplot(xlabel="chunk of the embeddings' coordinates", ylabel=f"{metric}, {unit(metric)}")
    drawn = on_axis([r.change[metric] for r in ordered], metric)
    places, start = [r.part for r in ordered], none(metric)
    axes.bar(places, [d.value - start for d in drawn], bottom=start, color=BLUE, width=0.9)
    axes.vlines(places, [d.low for d in drawn], [d.high for d in drawn], color="black", lw=1)
    for place, one in zip(places, drawn, strict=True):
        if one.broken:
            axes.annotate("∞", (place, one.value), ha="center", va="bottom")
    axes.axhline(start, color="black", lw=0.8)
    axes.locator_params(axis="x", integer=True)
    scaled(axes, "y", drawn, metric)
    figure.suptitle(f"Change in {metric} when a chunk of the embeddings is knocked out; 95 % intervals")


def beside_picture(studies: Mapping[str, Sequence[KnockoutResult]], metric: str) -> Picture:
    """One metric of several studies."""
    parts = {(r.strategy, r.component) for rs in studies.values() for r in knocked(rs) if metric in r.change}
    size = (WIDE, EDGE + ROW * min(BARS, len(parts)))
    return Picture(partial(beside, studies=studies, metric=metric), size)


def beside(figure: Figure, studies: Mapping[str, Sequence[KnockoutResult]], metric: str) -> None:
    """A dot for each study and part, those first that do the most anywhere."""
    found = {
        name: {(r.strategy, r.component): r for r in knocked(rs) if metric in r.change} for name, rs in studies.items()
    }
    worst: dict[tuple[str, str], float] = {}
    for results in found.values():
        for key, result in results.items():
            worst[key] = max(worst.get(key, -math.inf), damage(result, metric))
    keys = sorted(worst, key=lambda key: -worst[key])[:BARS]
    axes = figure.add_subplot(xlabel=f"{metric}, {unit(metric)}; lines: 95 % intervals")
    every: list[OnAxis] = []
    changes = [r.change[metric] for results in found.values() for k, r in results.items() if k in keys]
    for number, (name, results) in enumerate(found.items()):
        rows = [i for i, key in enumerate(keys) if key in results]
        drawn = on_axis([results[keys[i]].change[metric] for i in rows], metric, changes)
        every += drawn
        _dots(axes, rows, drawn, name, number, len(found))
    axes.axvline(none(metric), color="black", lw=0.8)
    axes.set_yticks(range(len(keys)), [component for _, component in keys], fontsize="small")
    axes.set_ylim(len(keys) - 0.4, -0.6)
    scaled(axes, "x", every, metric)
    figure.suptitle(f"Change in {metric} when a part is knocked out, by study")
    add_legend(axes, 3)


def _dots(axes: Axes, rows: Sequence[int], drawn: Sequence[OnAxis], name: str, number: int, of: int) -> None:
    """One study's dots and lines, a little off the row's middle so that they do not cover those of others."""
    colour = COLOURS[number % len(COLOURS)]
    off = [row + (number - (of - 1) / 2) * 0.6 / of for row in rows]
    axes.hlines(off, [d.low for d in drawn], [d.high for d in drawn], color=colour, lw=1)
    axes.plot([d.value for d in drawn], off, "o", ms=4, color=colour, label=name)
    for y, one in zip(off, drawn, strict=True):
        if one.broken:
            axes.annotate("  ∞", (one.value, y), va="center", color=colour)


# ------------------------------------------------------------------------------------------------ axes
@dataclass(frozen=True)
class OnAxis:
    """A change in its axis' unit, cut where it has no end."""

    value: float
    low: float
    high: float
    broken: bool


def on_axis(changes: Sequence[Score], metric: str, among: Sequence[Score] | None = None) -> list[OnAxis]:
    """Changes as they are drawn; what has no end is cut a little beyond the largest finite one of ``among``."""
    ends = [harm(x, metric) for s in among or changes for x in (s.value, s.low, s.high)]
    cut = BROKEN * max((abs(h) for h in ends if math.isfinite(h)), default=0.0) or 1.0

    def place(x: float) -> float:
        return value_of(min(max(harm(x, metric), -cut), cut), metric) * scale(metric)

    made = []
    for s in changes:
        value, low, high = (place(s.value if math.isnan(x) else x) for x in (s.value, s.low, s.high))
        made.append(OnAxis(value, min(value, low), max(value, high), not math.isfinite(harm(s.value, metric))))
    return made


def scaled(axes: Axes, axis: str, drawn: Sequence[OnAxis], metric: str) -> None:
    """A logarithmic axis for ratios that lie far apart, with plain numbers beside it."""
    from matplotlib.ticker import LogLocator, NullFormatter

    ends = [x for d in drawn for x in (d.low, d.high)]
    if metric not in RATIOS or not ends or max(ends) / min(ends) < DECADES:
        return
    axes.set_xscale("log") if axis == "x" else axes.set_yscale("log")
    ticks = axes.xaxis if axis == "x" else axes.yaxis
    few = max(ends) / min(ends) < 100  # two decades: 1, 2, 5 between the powers fit
    ticks.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,)))
    ticks.set_major_formatter("{x:g}")
    ticks.set_minor_formatter(NullFormatter())
