"""All findings on one HTML page, each with its summary, plot and numbers."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from obliteratus.analyze.base import Finding, analyses
from obliteratus.report.html import Table, draw_svg, render_page

SCORE = {"value", "low", "high", "n", "unit"}


def findings_page(
    findings: Mapping[str, Finding], title: str, skipped: Mapping[str, str] = MappingProxyType({})
) -> str:
    """Return one self-contained HTML document: a table of contents, then each finding's summary, plot and numbers.

    skipped: analyses that did not run, with the reason of each; they are listed below the contents.
    """
    sections = [
        {
            "name": name,
            "about": _describe(name),
            "svg": draw_svg(finding.draw, name),
            "tables": number_tables(finding.to_dict()),
        }
        for name, finding in findings.items()
    ]
    lines = {name: finding.summary() for name, finding in findings.items()}
    return render_page("findings", title=title, lines=lines, skipped=skipped, sections=sections)


def _describe(name: str) -> str:
    """What a registered analysis measures, with its source; empty for others."""
    if name not in list(analyses):
        return ""
    entry = analyses[name]
    return entry.about.replace("``", "") + (f" ({entry.cite})" if entry.cite else "")


def number_tables(numbers: Mapping[str, Any]) -> list[Table]:
    """Return single values as one table, then lists of equal length as columns, with a row per stream index or site."""
    flat = dict(_flatten(numbers))
    lengths = [len(v) for v in flat.values() if isinstance(v, list)]
    shared = {n for n in lengths if n > 1 and lengths.count(n) > 1}
    single = {k: v for k, v in flat.items() if not (isinstance(v, list) and len(v) in shared)}
    tables = [(["", "value"], [[k, format_value(v)] for k, v in single.items()])] if single else []
    for n in sorted(shared):
        columns = {k: v for k, v in flat.items() if isinstance(v, list) and len(v) == n}
        rows = [[str(i), *(format_value(v[i]) for v in columns.values())] for i in range(n)]
        tables.append((["index", *columns], rows))
    return tables


def _flatten(numbers: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested dictionaries as one list; a score stays one value, and of a list of lists only the length is told."""
    flat: list[tuple[str, Any]] = []
    for key, value in numbers.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and set(value) != SCORE:
            flat += _flatten(value, f"{name}: ")
        elif isinstance(value, list) and any(isinstance(v, list) for v in value):
            flat.append((name, f"{len(value)} lists, in the JSON"))
        else:
            flat.append((name, value))
    return flat


def format_value(value: Any) -> str:
    """Return a value for people: four digits, an interval in brackets."""
    if isinstance(value, Mapping) and set(value) == SCORE:
        ends = "" if value["low"] is None else f" [{format_value(value['low'])}, {format_value(value['high'])}]"
        return f"{format_value(value['value'])}{ends}, n = {value['n']}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}".replace("-", "−")
    if isinstance(value, list):
        return ", ".join(format_value(v) for v in value) or "none"
    return "–" if value is None else str(value)
