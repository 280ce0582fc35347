"""Views of a run: its scores as a table, HTML that begins with what was achieved, and a plot of what changed."""

from __future__ import annotations

from typing import Any

from obliteratus.core.results import Run, Score
from obliteratus.core.views import Rows, register_view
from obliteratus.rebirth.headline import describe_headline
from obliteratus.rebirth.model_card import format_score
from obliteratus.report.curves import BLUE, ORANGE, Figure, add_legend
from obliteratus.report.notebook import make_view
from obliteratus.verify.score_names import describe_score, group_shown

STATES = ("before", "after", "change")


def tabulate_run(run: Run) -> Rows:
    """Return a row for each score: its name and key, and value and interval before, after, and of the change."""
    ends = [f"{state}{end}" for state in STATES for end in ("", "_low", "_high")]
    names = list(dict.fromkeys([*run.before, *run.after]))
    return ["score", "key", *ends, "n", "unit"], [_row(run, name) for name in names]


def _row(run: Run, name: str) -> list[Any]:
    states = [run.before.get(name), run.after.get(name), run.change.get(name)]
    cells = [cell for score in states for cell in ((score.value, score.low, score.high) if score else (None,) * 3)]
    known = next(score for score in states if score)
    return [describe_score(name, _behavior(run)), name, *cells, known.n, known.unit]


def _behavior(run: Run) -> str:
    return str(run.judge.get("behavior", "refusal"))


def show_run(run: Run) -> tuple[str, Rows]:
    """Return what was achieved, and the scores that tables show."""
    names = [name for group in group_shown([run.before, run.after], brief=True) for name in group]
    rows: list[list[Any]] = [
        [describe_score(name, _behavior(run)), format_score(run.before.get(name)), format_score(run.after.get(name))]
        for name in names
    ]
    return describe_headline(run) or run.describe(), (["score", "before", "after"], rows)


def draw_run(run: Run, figure: Figure) -> None:
    """Draw the shares before and after with their intervals."""
    shown = [name for group in group_shown([run.before, run.after], brief=True) for name in group]
    shares = [name for name in shown if name in run.before and name in run.after and run.after[name].unit == "share"]
    names = shares[::-1]  # the first one at the top
    axes = figure.add_subplot(xlabel="share of prompts (%), 95 % intervals")
    for shift, state, color in ((0.15, run.before, ORANGE), (-0.15, run.after, BLUE)):
        label = "before" if state is run.before else "after"
        for y, name in enumerate(names):
            _draw_score(axes, state[name], y + shift, color, label if y == 0 else "")
    axes.set_yticks(range(len(names)), [describe_score(name, _behavior(run)) for name in names])
    axes.set_xlim(-2, 102)
    if names:
        add_legend(axes)


def _draw_score(axes: Any, score: Score, y: float, color: str, label: str) -> None:
    if score.has_interval:
        axes.plot([100 * score.low, 100 * score.high], [y, y], color=color, lw=2, alpha=0.4)
    axes.plot([100 * score.value], [y], "o", color=color, label=label or None)


register_view(Run, make_view(tabulate_run, draw_run, show_run))
