"""A study's plots: bars with intervals, maps of blocks, heads and experts, chunks of the embeddings, comparisons."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from obliteratus.core.results import Score
from obliteratus.report.curves import BLUE, GREY, MAX_TICKS, ORANGE, PALETTE, Axes, Figure, add_legend
from obliteratus.report.html import FIGURE_SIZE
from obliteratus.study.base import KnockoutResult
from obliteratus.study.ranking import (
    RATIOS,
    change_of_damage,
    damage_of,
    damage_of_change,
    is_clear_damage,
    knockout_results,
    name_effect,
    no_change,
    rank_results,
)
from obliteratus.study.tables import change_unit, display_scale, format_number, part_name

MAX_BARS = 24  # parts whose names stay legible in one plot
MAX_CONTROLS = 6  # the worst random controls are enough to show what chance does
ROW, MARGINS = 0.26, 1.3  # inches: of a bar, and of title and axis together
WIDTH = FIGURE_SIZE[0]
CUT_FACTOR = 1.15  # × the longest finite bar: where an infinite one is cut
LOG_FROM = 5.0  # an axis is logarithmic from this ratio between its ends on
GRIDS = {"heads": "head", "experts": "expert"}
EMBEDDINGS = "embeddings"
MAX_NUMBERED = 16  # blocks side by side up to which numbers fit into the fields of a map
COMMON, FAR = 0.9, 3.0  # a map's scale ends at most at so many times the value that this share of parts stays below
DARK = 0.6  # share of the scale from which on numbers are white
UNMEASURED = "#DDDDDD"
MAP_ROWS = {
    "layers": "whole block",
    "attention": "attention",
    "ffn": "feed-forward",
    "heads": "heads, mean",
    "experts": "experts, mean",
    "neurons": "neurons, mean",
    "ranges": "run of blocks from here",
}


@dataclass(frozen=True)
class Picture:
    """Something that can be drawn."""

    draw: Callable[[Figure], None]
    size: tuple[float, float]
    """Inches."""


def study_pictures(results: Sequence[KnockoutResult], metric: str) -> dict[str, Picture]:
    """Return all plots that the study has results for, by names that can be used in file names."""
    measured = [r for r in knockout_results(results) if metric in r.change]
    pictures: dict[str, Picture] = {}
    if bars := select_bars(measured, metric):
        pictures["impact"] = Picture(partial(draw_bars, bars=bars, metric=metric), (WIDTH, MARGINS + ROW * len(bars)))
    if rows := mean_damage_by_block(measured, metric):
        size = (WIDTH, MARGINS + 0.5 * len(rows))  # inches a row, so that numbers fit in
        pictures["blocks"] = Picture(partial(draw_block_map, rows=rows, metric=metric), size)
    for strategy, name in GRIDS.items():
        parts = [r for r in measured if r.strategy == strategy and r.part >= 0]
        if len({r.part for r in parts}) > 1:
            height = min(8.0, 0.22 * (1 + max(r.part for r in parts)))  # inches: a page, and a row with its tick
            draw = partial(draw_grid, parts=parts, metric=metric, name=name)
            pictures[strategy] = Picture(draw, (WIDTH, MARGINS + height))
    if chunks := [r for r in measured if r.strategy == EMBEDDINGS]:
        pictures[EMBEDDINGS] = Picture(partial(draw_chunks, chunks=chunks, metric=metric), (WIDTH, 3.2))
    return pictures


# ------------------------------------------------------------------------------------------------ bars
def select_bars(results: Sequence[KnockoutResult], metric: str) -> list[KnockoutResult]:
    """Return the results that get a bar, the most damaging first: parts, and a few controls for comparison."""
    ranked = [r for r in rank_results(results, metric) if metric in r.change]
    parts = {r.component for r in [r for r in ranked if not r.control][:MAX_BARS]}
    controls = {r.component for r in [r for r in ranked if r.control][:MAX_CONTROLS]}
    return [r for r in ranked if r.component in parts | controls]


def draw_bars(figure: Figure, bars: Sequence[KnockoutResult], metric: str) -> None:
    """Draw a bar per part, starting at no change, the worst at the top, with 95 % intervals; controls are gray."""
    axes = figure.add_subplot(xlabel=f"{metric}, {change_unit(metric)}; lines: 95 % intervals")
    points = place_changes([r.change[metric] for r in bars], metric)
    start = no_change(metric)
    effect = name_effect(metric)
    labels = (ORANGE, f"{effect} only"), (BLUE, f"interval reaches no {effect}"), (GREY, "random control")
    for color, label in labels:
        rows = [i for i, r in enumerate(bars) if _bar_color(r, metric) == color]
        if rows:
            axes.barh(rows, [points[i].value - start for i in rows], left=start, color=color, label=label, height=0.7)
    for i, point in enumerate(points):
        axes.plot([point.low, point.high], [i, i], color="black", lw=1)
        if point.infinite:
            axes.annotate(" ∞", (point.value, i), va="center")
    axes.axvline(start, color="black", lw=0.8)
    axes.set_yticks(range(len(bars)), [part_name(r) for r in bars], fontsize="small")
    axes.set_ylim(len(bars) - 0.4, -0.6)
    _set_scale(axes, "x", points, metric)
    figure.suptitle(f"Change in {metric} when a part is knocked out, the strongest {effect} first")
    add_legend(axes, 3)


def _bar_color(result: KnockoutResult, metric: str) -> str:
    if result.control:
        return GREY
    return ORANGE if is_clear_damage(result.change[metric], metric) else BLUE


def draw_chunks(figure: Figure, chunks: Sequence[KnockoutResult], metric: str) -> None:
    """Draw a bar with its interval for each chunk of the embeddings, in their order."""
    ordered = sorted(chunks, key=lambda r: r.part)
    axes = figure.add_subplot(xlabel="chunk of the embeddings' coordinates", ylabel=f"{metric}, {change_unit(metric)}")
    points = place_changes([r.change[metric] for r in ordered], metric)
    x, start = [r.part for r in ordered], no_change(metric)
    axes.bar(x, [p.value - start for p in points], bottom=start, color=BLUE, width=0.9)
    axes.vlines(x, [p.low for p in points], [p.high for p in points], color="black", lw=1)
    for chunk, point in zip(x, points, strict=True):
        if point.infinite:
            axes.annotate("∞", (chunk, point.value), ha="center", va="bottom")
    axes.axhline(start, color="black", lw=0.8)
    axes.locator_params(axis="x", integer=True)
    _set_scale(axes, "y", points, metric)
    figure.suptitle(f"Change in {metric} when a chunk of the embeddings is knocked out; 95 % intervals")


# ----------------------------------------------------------------------------------------- side by side
def comparison_picture(studies: Mapping[str, Sequence[KnockoutResult]], metric: str) -> Picture:
    """Return the plot of one metric of several studies."""
    parts = {(r.strategy, r.component) for rs in studies.values() for r in knockout_results(rs) if metric in r.change}
    size = (WIDTH, MARGINS + ROW * min(MAX_BARS, len(parts)))
    return Picture(partial(draw_comparison, studies=studies, metric=metric), size)


def draw_comparison(figure: Figure, studies: Mapping[str, Sequence[KnockoutResult]], metric: str) -> None:
    """Draw a dot per study and part, first the parts with the most damage in any study."""
    by_study = {
        name: {(r.strategy, r.component): r for r in knockout_results(rs) if metric in r.change}
        for name, rs in studies.items()
    }
    worst: dict[tuple[str, str], float] = {}
    for results in by_study.values():
        for key, result in results.items():
            worst[key] = max(worst.get(key, -math.inf), damage_of(result, metric))
    keys = sorted(worst, key=lambda key: -worst[key])[:MAX_BARS]
    axes = figure.add_subplot(xlabel=f"{metric}, {change_unit(metric)}; lines: 95 % intervals")
    all_points: list[AxisPoint] = []
    changes = [r.change[metric] for results in by_study.values() for k, r in results.items() if k in keys]
    for number, (name, results) in enumerate(by_study.items()):
        rows = [i for i, key in enumerate(keys) if key in results]
        points = place_changes([results[keys[i]].change[metric] for i in rows], metric, changes)
        all_points += points
        # a little off the row's middle, so that studies do not cover each other
        offset = (number - (len(by_study) - 1) / 2) * 0.6 / len(by_study)
        _draw_dots(axes, [row + offset for row in rows], points, name, PALETTE[number % len(PALETTE)])
    axes.axvline(no_change(metric), color="black", lw=0.8)
    axes.set_yticks(range(len(keys)), [component for _, component in keys], fontsize="small")
    axes.set_ylim(len(keys) - 0.4, -0.6)
    _set_scale(axes, "x", all_points, metric)
    figure.suptitle(f"Change in {metric} when a part is knocked out, by study")
    add_legend(axes, 3)


def _draw_dots(axes: Axes, y: Sequence[float], points: Sequence[AxisPoint], name: str, color: str) -> None:
    axes.hlines(y, [p.low for p in points], [p.high for p in points], color=color, lw=1)
    axes.plot([p.value for p in points], y, "o", ms=4, color=color, label=name)
    for row, point in zip(y, points, strict=True):
        if point.infinite:
            axes.annotate("  ∞", (point.value, row), va="center", color=color)


# ------------------------------------------------------------------------------------------------ axes
@dataclass(frozen=True)
class AxisPoint:
    """A change in the unit of its axis, cut if it is infinite."""

    value: float
    low: float
    high: float
    infinite: bool


def place_changes(changes: Sequence[Score], metric: str, among: Sequence[Score] | None = None) -> list[AxisPoint]:
    """Return changes as they are drawn; infinite ones are cut a little beyond the largest finite one of ``among``."""
    damages = [damage_of_change(x, metric) for s in among or changes for x in (s.value, s.low, s.high)]
    cut = CUT_FACTOR * max((abs(d) for d in damages if math.isfinite(d)), default=0.0) or 1.0

    def place(x: float) -> float:
        damage = min(max(damage_of_change(x, metric), -cut), cut)
        return change_of_damage(damage, metric) * display_scale(metric)

    points = []
    for s in changes:
        value, low, high = (place(s.value if math.isnan(x) else x) for x in (s.value, s.low, s.high))
        infinite = not math.isfinite(damage_of_change(s.value, metric))
        points.append(AxisPoint(value, min(value, low), max(value, high), infinite))
    return points


def _set_scale(axes: Axes, axis: str, points: Sequence[AxisPoint], metric: str) -> None:
    """Make the axis of ratios that lie far apart logarithmic, with plain numbers as labels."""
    from matplotlib.ticker import LogLocator, NullFormatter

    ends = [x for p in points for x in (p.low, p.high)]
    if metric not in RATIOS or not ends or max(ends) / min(ends) < LOG_FROM:
        return
    axes.set_xscale("log") if axis == "x" else axes.set_yscale("log")
    ticks = axes.xaxis if axis == "x" else axes.yaxis
    two_decades = max(ends) / min(ends) < 100  # then 2 and 5 fit between the powers of ten
    ticks.set_major_locator(LogLocator(subs=(1, 2, 5) if two_decades else (1,)))
    ticks.set_major_formatter("{x:g}")
    ticks.set_minor_formatter(NullFormatter())


# ------------------------------------------------------------------------------------------------ maps
BlockRow = dict[int, float]
"""Damage by block, averaged over its parts; infinite if one of them broke the model."""


def mean_damage_by_block(results: Sequence[KnockoutResult], metric: str) -> dict[str, BlockRow]:
    """Return a row for each kind of part that lies in blocks, without random controls."""
    rows: dict[str, BlockRow] = {}
    for strategy, name in MAP_ROWS.items():
        damages: dict[int, list[float]] = {}
        for r in results:
            if r.strategy == strategy and r.layer >= 0 and not r.control:
                damages.setdefault(r.layer, []).append(damage_of(r, metric))
        if damages:
            rows[name] = {layer: sum(values) / len(values) for layer, values in damages.items()}
    return rows


def draw_block_map(figure: Figure, rows: dict[str, BlockRow], metric: str) -> None:
    """Draw damage as color, with blocks across and kinds of parts down."""
    layers = range(1 + max(layer for row in rows.values() for layer in row))
    values = [[row.get(layer, math.nan) for layer in layers] for row in rows.values()]
    axes = figure.add_subplot(xlabel="block")
    _draw_damage_map(figure, axes, values, metric)
    axes.set_yticks(range(len(rows)), list(rows))
    figure.suptitle(f"Change in {metric} by block and part knocked out")


def draw_grid(figure: Figure, parts: Sequence[KnockoutResult], metric: str, name: str) -> None:
    """Draw damage as color, with blocks across and their heads or experts down."""
    damages = {(r.layer, r.part): damage_of(r, metric) for r in parts}
    layers, numbers = (range(1 + max(key[i] for key in damages)) for i in (0, 1))
    axes = figure.add_subplot(xlabel="block", ylabel=name)
    values = [[damages.get((layer, number), math.nan) for layer in layers] for number in numbers]
    _draw_damage_map(figure, axes, values, metric)
    figure.suptitle(f"Change in {metric} when one {name} is knocked out")


def _draw_damage_map(figure: Figure, axes: Axes, values: Sequence[Sequence[float]], metric: str) -> None:
    """Blue through white, which is no damage, to red; an infinite value is as dark as the worst and marked ∞."""
    limit = choose_limit([abs(v) for row in values for v in row if math.isfinite(v)])
    cut = [[v if math.isnan(v) else min(max(v, -limit), limit) for v in row] for row in values]
    axes.set_facecolor(UNMEASURED)
    image = axes.imshow(cut, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    width = len(values[0])
    axes.set_xticks(range(0, width, -(-width // MAX_TICKS)))
    axes.set_yticks(range(0, len(values), -(-len(values) // MAX_TICKS)))
    beyond = any(abs(v) > limit for row in values for v in row if math.isfinite(v))
    label = change_unit(metric) + (", numbers: beyond the scale" if beyond else "")
    extend = "both" if beyond else "neither"
    bar = figure.colorbar(image, ax=axes, label=label, extend=extend, format=lambda v, _: _format_damage(v, metric))
    bar.ax.tick_params(labelsize="small")
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            if abs(value) > limit or (width <= MAX_NUMBERED and not math.isnan(value)):
                color = "white" if abs(value) > DARK * limit else "black"
                text, turned = _format_damage(value, metric), 90 if width > MAX_NUMBERED else 0
                axes.text(x, y, text, ha="center", va="center", color=color, fontsize="x-small", rotation=turned)


def choose_limit(sizes: Sequence[float]) -> float:
    """Return where the scale of a map ends: at the largest value, or earlier where few are far beyond the others.

    Otherwise a block without which the model breaks would leave all others white.
    """
    if not sizes:
        return 1.0
    common = sorted(sizes)[math.ceil(COMMON * len(sizes)) - 1]
    return min(max(sizes), FAR * common) or max(sizes) or 1.0


def _format_damage(damage: float, metric: str) -> str:
    """Return damage as the change of the metric, in its unit, with three digits."""
    if math.isinf(damage):
        return "∞"
    value = change_of_damage(damage, metric) * display_scale(metric) + 0.0  # turns −0 into 0
    return format_number(value) if abs(value) >= 1e5 else f"{value:.3g}".replace("-", "−")  # 1e5: digits tell nothing
