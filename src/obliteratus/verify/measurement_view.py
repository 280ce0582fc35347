"""Views of a measurement: its scores as a table, as HTML and as a plot of those that are shares."""

from __future__ import annotations

from typing import Any

from obliteratus.core.views import Rows, register_view
from obliteratus.report.curves import BLUE, Figure
from obliteratus.report.notebook import make_view
from obliteratus.verify.score_names import describe_score
from obliteratus.verify.scoring import Measurement


def tabulate_measurement(measured: Measurement) -> Rows:
    """Return a row for each score, with its interval and sample size."""
    columns = ["score", "key", "value", "low", "high", "n", "unit"]
    scores = measured.scores.items()
    return columns, [[describe_score(k), k, s.value, s.low, s.high, s.n, s.unit] for k, s in scores]


def show_measurement(measured: Measurement) -> tuple[str, Rows]:
    """Return how many scores there are, and each with its interval."""
    rows: list[list[Any]] = [[describe_score(name), str(score)] for name, score in measured.scores.items()]
    return f"{len(measured.scores)} scores", (["score", "value"], rows)


def draw_measurement(measured: Measurement, figure: Figure) -> None:
    """Draw the shares with their intervals, the first at the top."""
    shares = [(name, score) for name, score in measured.scores.items() if score.unit == "share"][::-1]
    axes = figure.add_subplot(xlabel="share of prompts (%), 95 % intervals")
    for y, (_, score) in enumerate(shares):
        if score.has_interval:
            axes.plot([100 * score.low, 100 * score.high], [y, y], color=BLUE, lw=2, alpha=0.4)
        axes.plot([100 * score.value], [y], "o", color=BLUE)
    axes.set_yticks(range(len(shares)), [describe_score(name) for name, _ in shares])
    axes.set_xlim(-2, 102)


register_view(Measurement, make_view(tabulate_measurement, draw_measurement, show_measurement))
