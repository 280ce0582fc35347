"""How findings draw: lines over stream indices with their bands, matrices with their scale, in colours all can tell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from obliteratus.core.results import Score

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure  # takes half a second to load, and few commands draw
else:
    Axes = Figure = Any  # tests check annotations when functions are called

__all__ = [
    "BLUE",
    "GREEN",
    "GREY",
    "ORANGE",
    "Axes",
    "Figure",
    "add_legend",
    "plot_band",
    "plot_curve",
    "plot_matrix",
    "plot_range",
]

# Colours that colour-blind readers tell apart (Okabe and Ito); grey is what chance makes.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#999999"
NAMED = 24  # ticks that still can be read beside a matrix
SHORT = 3  # letters that fit beside each other under a matrix
FEW = 12  # columns whose numbers need not be turned
FAINT = 0.2  # opacity of a band: the lines of others show through it


def plot_curve(axes: Axes, values: Tensor, label: str, colour: str = BLUE) -> None:
    """One value for each stream index."""
    axes.plot(range(len(values)), values.tolist(), ".-", color=colour, label=label)
    axes.locator_params(axis="x", integer=True)


def plot_band(axes: Axes, scores: Sequence[Score], label: str, colour: str = BLUE) -> None:
    """One score for each stream index, with its interval."""
    x = range(len(scores))
    axes.plot(x, [s.value for s in scores], ".-", color=colour, label=label)
    axes.locator_params(axis="x", integer=True)
    axes.fill_between(x, [s.low for s in scores], [s.high for s in scores], color=colour, alpha=FAINT, lw=0)


def plot_range(axes: Axes, low: Tensor, high: Tensor, label: str) -> None:
    """What chance makes, at each stream index."""
    axes.fill_between(range(len(low)), low.tolist(), high.tolist(), color=GREY, alpha=2 * FAINT, lw=0, label=label)


def add_legend(axes: Axes, columns: int = 2) -> None:
    """Above the plot, where it hides nothing."""
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=columns, frameon=False, fontsize="small")


def plot_matrix(figure: Figure, axes: Axes, values: Tensor, names: Sequence[str], label: str) -> None:
    """Values from −1 to 1 as colours; with many rows, only some are named. Columns bear the rows' numbers, or names
    where these are short."""
    image = axes.imshow(values.tolist(), vmin=-1, vmax=1, cmap="RdBu")
    step = -(-len(names) // NAMED)
    shown = range(0, len(names), step)
    long = max(map(len, names)) > SHORT
    axes.set_xticks(shown, [str(i + 1) if long else names[i] for i in shown], rotation=90 if len(shown) > FEW else 0)
    axes.set_yticks(shown, [f"{names[i]}  {i + 1}" if long else names[i] for i in shown])
    figure.colorbar(image, ax=axes, label=label)
