"""A study on one HTML page that needs nothing beside it: what was found by each metric, its pictures, all numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from obliteratus.analyze.page import document, embedded, name_of, rendered
from obliteratus.analyze.page import table as html_table
from obliteratus.study.base import KnockoutResult
from obliteratus.study.plots import Picture
from obliteratus.study.tables import beside, ordered_metrics, shared_metrics, table, told

LEGEND = (
    "The whole model's row holds its scores. All others hold changes against it, with 95 % intervals: ratios (×) of "
    "perplexity, percentage points of shares, nats of KL. The most damaging part comes first."
)


def drawn(pictures: Mapping[str, Picture], metric: str) -> dict[str, str]:
    """Pictures as SVG, text as outlines. The same results give the same text."""
    return {name: rendered(p.draw, f"{metric}-{name}", p.size) for name, p in pictures.items()}


def page(
    results: Sequence[KnockoutResult],
    title: str,
    seen: Mapping[str, Mapping[str, str]],
    by: str = "",
    settings: str = "",
) -> str:
    """One self-contained document: what stands out by each metric, its pictures, then every part's numbers.

    seen: SVG by metric and name, as `drawn` makes them. by: the metric that orders the numbers and comes first.
    settings: the study file, shown at the end. The page names no other file and runs no script; words are escaped.
    """
    names = ordered_metrics(results, by)
    lines = {name: told(results, name) for name in names}
    sections = [_section(name, f'<p class="told">{escape(lines[name])}</p>', seen.get(name, {})) for name in names]
    numbers = f'<p class="about">{escape(LEGEND)}</p>\n{html_table(*table(results, by=by))}'
    ends = [_section("All parts", numbers)]
    ends += [_section("Settings", f"<pre>{escape(settings)}</pre>")] if settings else []
    return document(title, "\n".join([_contents(lines), *sections, *ends]))


def page_beside(
    studies: Mapping[str, Sequence[KnockoutResult]], title: str, seen: Mapping[str, Mapping[str, str]]
) -> str:
    """Several studies: each metric's picture, and its changes in a column for each study."""
    lines = {metric: f"{len(studies)} studies" for metric in shared_metrics(studies)}
    about = f'<p class="about">{escape(LEGEND)}</p>'
    made = [_section(m, html_table(*beside(studies, m)), seen.get(m, {})) for m in lines]
    return document(title, "\n".join([_contents(lines), about, *made]))


def _contents(lines: Mapping[str, str]) -> str:
    links = [f'<li><a href="#{name_of(n)}">{escape(n)}</a>: {escape(line)}</li>' for n, line in lines.items()]
    return "<nav><ol>\n" + "\n".join(links) + "\n</ol></nav>"


def _section(name: str, body: str, seen: Mapping[str, str] | None = None) -> str:
    """A heading, pictures, and what is said of them."""
    images = [f'<img alt="{escape(f"{name}, {what}")}" src="{embedded(svg)}">' for what, svg in (seen or {}).items()]
    parts = [f'<section id="{name_of(name)}">', f"<h2>{escape(name)}</h2>", body, *images, "</section>"]
    return "\n".join(parts)
