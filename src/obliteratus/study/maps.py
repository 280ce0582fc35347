"""A study's changes as colours: parts by block, and heads or experts one by one."""

from __future__ import annotations

import math
from collections.abc import Sequence

from obliteratus.report.curves import NAMED, Axes, Figure
from obliteratus.study.base import KnockoutResult
from obliteratus.study.ranking import damage, value_of
from obliteratus.study.tables import scale, shown_number, unit

WRITTEN = 16  # blocks beside each other whose numbers still can be written into their fields
DARK = 0.6  # share of the scale from which on numbers are white
EMPTY = "#DDDDDD"  # fields that nothing was measured for
ROWS = {
    "layers": "whole block",
    "attention": "attention",
    "ffn": "feed-forward",
    "heads": "heads, mean",
    "experts": "experts, mean",
    "neurons": "neurons, mean",
    "ranges": "run of blocks from here",
}

Row = dict[int, float]
"""By block: the damage, the mean of it where there are several parts; infinite where one of them broke the model."""


def averaged(taken: Sequence[KnockoutResult], metric: str) -> dict[str, Row]:
    """A row for each kind of part that lies in blocks, those drawn at random left out."""
    made: dict[str, Row] = {}
    for strategy, name in ROWS.items():
        found: dict[int, list[float]] = {}
        for r in taken:
            if r.strategy == strategy and r.layer >= 0 and not r.control:
                found.setdefault(r.layer, []).append(damage(r, metric))
        if found:
            made[name] = {layer: sum(values) / len(values) for layer, values in found.items()}
    return made


def blocks(figure: Figure, rows: dict[str, Row], metric: str) -> None:
    """Blocks across, kinds of parts down; red is damage."""
    layers = range(1 + max(layer for row in rows.values() for layer in row))
    values = [[row.get(layer, math.nan) for layer in layers] for row in rows.values()]
    axes = figure.add_subplot(xlabel="block")
    coloured(figure, axes, values, metric)
    axes.set_yticks(range(len(rows)), list(rows))
    figure.suptitle(f"Change in {metric} by block and part knocked out")


def grid(figure: Figure, parts: Sequence[KnockoutResult], metric: str, name: str) -> None:
    """Blocks across, their heads or experts down."""
    place = {(r.layer, r.part): damage(r, metric) for r in parts}
    layers, down = (range(1 + max(key[i] for key in place)) for i in (0, 1))
    axes = figure.add_subplot(xlabel="block", ylabel=name)
    coloured(figure, axes, [[place.get((layer, part), math.nan) for layer in layers] for part in down], metric)
    figure.suptitle(f"Change in {metric} when one {name} is knocked out")


def coloured(figure: Figure, axes: Axes, values: Sequence[Sequence[float]], metric: str) -> None:
    """Damage from blue through white, which is none, to red; what is infinite is as dark as the worst, and says so."""
    finite = [abs(v) for row in values for v in row if math.isfinite(v)]
    most = max(finite, default=0.0) or 1.0
    cut = [[v if math.isnan(v) else min(max(v, -most), most) for v in row] for row in values]
    axes.set_facecolor(EMPTY)
    image = axes.imshow(cut, cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto", interpolation="nearest")
    width = len(values[0])
    axes.set_xticks(range(0, width, -(-width // NAMED)))
    axes.set_yticks(range(0, len(values), -(-len(values) // NAMED)))
    bar = figure.colorbar(image, ax=axes, label=unit(metric), format=lambda v, _: written(v, metric))
    bar.ax.tick_params(labelsize="small")
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            if math.isinf(value) or (width <= WRITTEN and not math.isnan(value)):
                colour = "white" if abs(value) > DARK * most else "black"
                axes.text(x, y, written(value, metric), ha="center", va="center", color=colour, fontsize="small")


def written(harmful: float, metric: str) -> str:
    """Damage as the change that it is, in the metric's unit: three digits."""
    if math.isinf(harmful):
        return "∞"
    value = value_of(harmful, metric) * scale(metric) + 0.0  # −0 is 0
    return shown_number(value) if abs(value) >= 1e5 else f"{value:.3g}".replace("-", "−")  # 1e5: digits say nothing
