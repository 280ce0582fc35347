"""A study, or several side by side, on one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from obliteratus.report.answer_cards import make_cards
from obliteratus.report.hide import hide_private
from obliteratus.report.html import draw_svg, render_page
from obliteratus.study.base import KnockoutResult
from obliteratus.study.plots import Picture
from obliteratus.study.ranking import is_falling, knockout_results, metric_names, rank_results
from obliteratus.study.tables import changes_table, comparison_table, ordered_metrics, shared_metrics, summarize

LEGEND = (
    "The row of the whole model holds its scores. All other rows hold changes against it with 95 % intervals: ratios "
    "(×) of perplexity, percentage points of shares, nats of KL. Each interval is that of one part by itself; the line "
    "under a metric's title holds for all parts together. The part whose loss changes most for the worse comes first."
)


def draw_pictures(pictures: Mapping[str, Picture], metric: str) -> dict[str, str]:
    """Return the pictures of one metric as SVG. The same results give the same text."""
    return {name: draw_svg(picture.draw, f"{metric}-{name}", picture.size) for name, picture in pictures.items()}


def study_page(
    results: Sequence[KnockoutResult],
    title: str,
    pictures: Mapping[str, Mapping[str, str]],
    by: str = "",
    settings: str = "",
    answers: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Return the page of one study: a summary and pictures for each metric, then a table of all parts.

    pictures: SVG by metric and name. by: the metric that comes first and orders the table, by default the study's
    first. settings: the text of the study file, shown at the end. answers: the lines of ``answers.jsonl``, of which the
    page shows those that changed under the part that changes the behavior's rate most.
    """
    names = ordered_metrics(results, by)
    columns, rows = changes_table(results, by=by)
    return render_page(
        "study",
        title=hide_private(title),
        headline=describe_study(results, names),
        lines={name: summarize(results, name) for name in names},
        pictures={name: pictures.get(name, {}) for name in names},
        legend=LEGEND,
        columns=columns,
        rows=rows,
        settings=hide_private(settings),
        answered=describe_answers(results, answers),
    )


def describe_study(results: Sequence[KnockoutResult], names: Sequence[str]) -> str:
    """Return how many parts were knocked out, and what the first metric says of them."""
    parts = sum(not r.control for r in knockout_results(results))
    first = f" By {names[0]}: {summarize(results, names[0])}." if names else ""
    return f"{parts} parts were knocked out one at a time.{first}"


def describe_answers(results: Sequence[KnockoutResult], answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the answers that changed class under the part that changes the behavior most; empty if none did."""
    rates = [name for name in metric_names(results) if is_falling(name) and name != "accuracy"]
    parts = [r.component for r in rank_results(results, rates[0]) if not r.control] if rates else []
    lines = [line for line in answers if parts and line["component"] == parts[0]]
    names = {"before": "whole model", "after": f"without {parts[0]}" if parts else ""}
    cards = [card for card in make_cards(lines, rates[0].partition(".")[0] if rates else "", names) if card.changed]
    return {"part": parts[0], "n": len(lines), "cards": cards} if cards else {}


def comparison_page(
    studies: Mapping[str, Sequence[KnockoutResult]], title: str, pictures: Mapping[str, Mapping[str, str]]
) -> str:
    """Return the page of several studies: a picture for each metric, and a table with a column for each study."""
    names = shared_metrics(studies)
    return render_page(
        "studies",
        title=hide_private(title),
        lines=dict.fromkeys(names, f"{len(studies)} studies"),
        pictures={name: pictures.get(name, {}) for name in names},
        legend=LEGEND,
        tables={name: comparison_table(studies, name) for name in names},
    )
