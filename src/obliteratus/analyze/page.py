"""All findings on one HTML page, each with its summary, plot and numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

from obliteratus.analyze.base import Finding, analyses
from obliteratus.report.hide import hide_private
from obliteratus.report.html import Table, draw_svg, render_page

SCORE = {"value", "low", "high", "n", "unit"}
QUESTIONS = {
    "certificate": "Do the two groups of prompts differ inside the model at all?",
    "cones": "Is the behavior one direction, or does each category have its own?",
    "decomposition": "Which blocks write the difference between the groups?",
    "entanglement": "In which layers would removing the direction also hurt other prompts?",
    "fingerprint": "What do the activations look like, for comparison with other models?",
    "footprint": "Which weight matrices write along the direction?",
    "geometry": "Does the direction stay the same from layer to layer?",
    "lens": "Which words does the direction make likelier or less likely?",
    "patching": "Which parts cause the behavior, if their outputs are exchanged?",
    "positions": "At which of the last tokens can the groups be told apart?",
    "reach": "How deep may edits begin and still end the behavior?",
    "repair": "Do later layers write the direction back after it was removed?",
    "sae": "Is the direction made of few features?",
    "separability": "How well can the groups be told apart on held-out prompts?",
    "transfer": "Does the direction of one model carry over to another?",
    "tuned_lens": "From which layer on is the answer decided?",
    "uncertainty": "How far would another sample of prompts turn the direction?",
}
"""What each analysis answers, in the words of someone who has not read its paper."""


@runtime_checkable
class Tested(Protocol):
    """A finding that is compared with chance."""

    @property
    def significant(self) -> Any:
        """What is beyond chance: streams, layers or parts, or whether the finding itself is."""


def findings_page(
    findings: Mapping[str, Finding],
    title: str,
    skipped: Mapping[str, str] = MappingProxyType({}),
    about: Sequence[str] = (),
) -> str:
    """Return one self-contained HTML document: a sentence on what was found, then each finding's question, summary,
    plot and numbers.

    skipped: analyses that did not run, with the reason of each; they are listed below the contents. about: what was
    analyzed, such as the date and the prompts.
    """
    sections = [
        {
            "name": name,
            "question": QUESTIONS.get(name, ""),
            "about": _describe(name),
            "empty": finds_nothing(finding),
            "svg": draw_svg(finding.draw, name),
            "tables": number_tables(finding.to_dict()),
        }
        for name, finding in findings.items()
    ]
    lines = {name: finding.summary() for name, finding in findings.items()}
    return render_page(
        "findings",
        title=hide_private(title),
        meta=[hide_private(part) for part in about],
        headline=describe_findings(findings),
        lines=lines,
        skipped=skipped,
        sections=sections,
    )


def finds_nothing(finding: Finding) -> bool:
    """Return whether a finding that is compared with chance is within it."""
    return isinstance(finding, Tested) and not finding.significant


def describe_findings(findings: Mapping[str, Finding]) -> str:
    """Return which findings that are compared with chance are beyond it, and which are not; '' if none is compared."""
    tested = {name: finding for name, finding in findings.items() if isinstance(finding, Tested)}
    beyond = [name for name, finding in tested.items() if not finds_nothing(finding)]
    within = [name for name in tested if name not in beyond]
    parts = [f"Beyond chance: {', '.join(beyond)}."] if beyond else []
    return " ".join(parts + ([f"Nothing beyond chance: {', '.join(within)}."] if within else []))


def _describe(name: str) -> str:
    """What a registered analysis measures, with its source; empty for others."""
    if name not in list(analyses):
        return ""
    entry = analyses[name]
    return entry.about.replace("``", "") + (f" ({entry.cite})" if entry.cite else "")


def number_tables(numbers: Mapping[str, Any]) -> list[Table]:
    """Return single values as one table, then lists of equal length as columns, with a row per stream index or site."""
    flat = dict(flatten_numbers(numbers))
    lengths = [len(v) for v in flat.values() if isinstance(v, list)]
    shared = {n for n in lengths if n > 1 and lengths.count(n) > 1}
    single = {k: v for k, v in flat.items() if not (isinstance(v, list) and len(v) in shared)}
    tables = [(["", "value"], [[k, format_value(v)] for k, v in single.items()])] if single else []
    for n in sorted(shared):
        columns = {k: v for k, v in flat.items() if isinstance(v, list) and len(v) == n}
        rows = [[str(i), *(format_value(v[i]) for v in columns.values())] for i in range(n)]
        tables.append((["index", *columns], rows))
    return tables


def flatten_numbers(numbers: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested dictionaries as one list; a score stays one value, and of a list of lists only the length is told."""
    flat: list[tuple[str, Any]] = []
    for key, value in numbers.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and set(value) != SCORE:
            flat += flatten_numbers(value, f"{name}: ")
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
