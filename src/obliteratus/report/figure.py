"""A figure that notebooks show by itself, without pyplot and its state."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

SIZE = (7.0, 3.2)  # inches: about the width of a notebook's cell


class ShownFigure(Figure):
    """A figure that is shown as SVG."""

    def _repr_svg_(self) -> str:
        file = io.StringIO()
        with rc_context({"svg.hashsalt": "obliteratus"}):  # otherwise ids differ each time, and so would notebooks
            self.savefig(file, format="svg", metadata={"Date": None})
        return file.getvalue()


def draw_figure(draw: Callable[[Any, Figure], None], shown: Any) -> ShownFigure:
    """Return a figure on which ``draw`` has drawn the object."""
    figure = ShownFigure(figsize=SIZE, layout="constrained")
    draw(shown, figure)
    return figure
