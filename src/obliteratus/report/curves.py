"""Plotting primitives: lines with intervals over stream indices, matrices, and colors that all readers tell apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from obliteratus.core.results import Score

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
else:
    Axes = Figure = Any  # matplotlib takes half a second to import; tests check annotations at run time

__all__ = [
    "BLUE",
    "GREEN",
    "GREY",
    "MAX_TICKS",
    "ORANGE",
    "PALETTE",
    "Axes",
    "Figure",
    "add_legend",
    "plot_band",
    "plot_curve",
    "plot_matrix",
    "plot_range",
]

# Colors that color-blind readers tell apart (Okabe and Ito); gray is for what chance produces.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#999999"
PALETTE = (BLUE, ORANGE, GREEN, "#CC79A7", "#56B4E9", "#E69F00")
MAX_TICKS = 24  # labels that stay legible beside a matrix
SHORT_LABEL = 3  # letters that fit next to each other under a matrix
MAX_UPRIGHT = 12  # columns whose labels need not be turned
BAND_OPACITY = 0.2  # so that the lines of other bands show through


def plot_curve(axes: Axes, values: Tensor, label: str, color: str = BLUE) -> None:
    """Plot one value per stream index."""
    axes.plot(range(len(values)), values.tolist(), ".-", color=color, label=label)
    axes.locator_params(axis="x", integer=True)


def plot_band(axes: Axes, scores: Sequence[Score], label: str, color: str = BLUE) -> None:
    """Plot one score per stream index with its interval."""
    x = range(len(scores))
    axes.plot(x, [s.value for s in scores], ".-", color=color, label=label)
    axes.locator_params(axis="x", integer=True)
    axes.fill_between(x, [s.low for s in scores], [s.high for s in scores], color=color, alpha=BAND_OPACITY, lw=0)


def plot_range(axes: Axes, low: Tensor, high: Tensor, label: str) -> None:
    """Shade what chance produces at each stream index."""
    x = range(len(low))
    axes.fill_between(x, low.tolist(), high.tolist(), color=GREY, alpha=2 * BAND_OPACITY, lw=0, label=label)


def add_legend(axes: Axes, columns: int = 2) -> None:
    """Add a legend above the plot, where it hides nothing."""
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=columns, frameon=False, fontsize="small")


def plot_matrix(figure: Figure, axes: Axes, values: Tensor, names: Sequence[str], label: str) -> None:
    """Plot values from −1 to 1 as colors, with at most `MAX_TICKS` rows named.

    Columns are labeled by the rows' names if these are short, else by the rows' numbers.
    """
    image = axes.imshow(values.tolist(), vmin=-1, vmax=1, cmap="RdBu")
    step = -(-len(names) // MAX_TICKS)
    ticks = range(0, len(names), step)
    long = max(map(len, names)) > SHORT_LABEL
    rotation = 90 if len(ticks) > MAX_UPRIGHT else 0
    axes.set_xticks(ticks, [str(i + 1) if long else names[i] for i in ticks], rotation=rotation)
    axes.set_yticks(ticks, [f"{names[i]}  {i + 1}" if long else names[i] for i in ticks])
    figure.colorbar(image, ax=axes, label=label)
