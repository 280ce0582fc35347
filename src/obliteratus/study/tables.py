"""A study's results as rows: for the terminal and pages, CSV, JSON, Markdown and LaTeX."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from obliteratus.core.results import Score
from obliteratus.study.base import KnockoutResult
from obliteratus.study.ranking import RATIOS, baseline, clear, damage, knocked, metric_of, metrics, ranked

Table = tuple[list[str], list[list[str]]]
"""Columns and rows."""

WHOLE = "whole model"
SHARES = ("refusal.", "degenerate.", "accuracy")  # what these names begin with is a share: its changes are in points
FACTS = ("strategy", "component", "layer", "part", "size", "control", "seconds")
LAST = "degenerate."  # whether answers are words at all: mostly they are, and the column says nothing
NEVER_BELOW = frozenset({"kl.first_token"})  # no change is the least that these can show, so no interval reaches it
LARGE = 1e5  # from here on a ratio's digits say nothing: 1.2e+07
SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "−": "$-$",
    "×": r"$\times$",
    "∞": r"$\infty$",
    **{c: f"\\{c}" for c in "&%$#_{}"},
}


# -------------------------------------------------------------------------------------------- for people
def table(results: Sequence[KnockoutResult], top: int | None = None, by: str = "", first: int | None = None) -> Table:
    """A row for the whole model, its scores as they are; then changes, the most damaging part first.

    top: at most so many parts, and as many controls beside them. by: the metric that orders them, by default the
    study's first. first: only so many metrics. UserError for a metric that was not taken.
    """
    names = ordered_metrics(results, by)[:first]
    whole = baseline(results)
    rows = [[WHOLE, "", *(shown(whole.scores.get(n), scale(n)) for n in names)]]
    for result in most(ranked(results, names[0]), top):
        rows.append([called(result), f"{result.size:,}", *(shown_change(result, n) for n in names)])
    return ["part", "parameters", *(headed(n) for n in names)], rows


def told(results: Sequence[KnockoutResult], metric: str) -> str:
    """What was found, in one line: the worst part, how many do clear damage, and what the controls do."""
    parts = [r for r in ranked(results, metric) if not r.control and metric in r.change]
    if not parts:
        return "no part is knocked out yet"
    said = [f"{parts[0].component} counts most, {shown_change(parts[0], metric)}"]
    if metric not in NEVER_BELOW:
        hurt = sum(clear(r.change[metric], metric) for r in parts)
        said.append(f"the intervals of {hurt} of {len(parts)} parts show damage only")
    chance = [damage(r, metric) for r in knocked(results) if r.control and metric in r.change]
    if chance:
        beyond = sum(damage(r, metric) > max(chance) for r in parts)
        said.append(f"{beyond} of {len(parts)} do more damage than each of {len(chance)} drawn at random")
    return "; ".join(said)


def beside(studies: Mapping[str, Sequence[KnockoutResult]], metric: str, top: int | None = None) -> Table:
    """One metric's changes, a column for each study; parts in the order of the most that they do anywhere.

    A part is the same in two studies where strategy and name are.
    """
    rows: dict[tuple[str, str], dict[str, KnockoutResult]] = {}
    for study, results in studies.items():
        for result in knocked(results):
            if metric in result.change:
                rows.setdefault((result.strategy, result.component), {})[study] = result
    ordered = sorted(rows.values(), key=lambda found: -max(damage(r, metric) for r in found.values()))
    cells = [
        [called(next(iter(f.values()))), *(shown_change(f[s], metric) if s in f else "–" for s in studies)]
        for f in ordered[:top]
    ]
    wholes = [shown(baseline(results).scores.get(metric), scale(metric)) for results in studies.values()]
    return ["part", *studies], [[WHOLE, *wholes], *cells]


def ordered_metrics(results: Sequence[KnockoutResult], by: str = "") -> list[str]:
    """All metrics, the ordering one first, LAST last. UserError for one that was not taken."""
    first = metric_of(results, by)
    return sorted(metrics(results), key=lambda name: (name != first, name.startswith(LAST)))


def shared_metrics(studies: Mapping[str, Sequence[KnockoutResult]]) -> list[str]:
    """What any of the studies measured, in the order in which they have it."""
    return list(dict.fromkeys(m for results in studies.values() for m in metrics(results)))


def most(ordered: Sequence[KnockoutResult], top: int | None) -> list[KnockoutResult]:
    """The first ``top`` parts, and the first ``top`` controls, in their order."""
    if top is None:
        return list(ordered)
    kept = [[r for r in ordered if r.control == control][:top] for control in (False, True)]
    names = {r.component for group in kept for r in group}
    return [r for r in ordered if r.component in names]


def called(result: KnockoutResult) -> str:
    """A part's name, with what it is where that is a control."""
    return f"{result.component} (control)" if result.control else result.component


def headed(metric: str) -> str:
    """A metric with its unit: ``refusal.target, %``; ratios bear theirs (×) themselves."""
    if metric.startswith("kl."):
        return f"{metric}, nats"
    return f"{metric}, %" if scale(metric) != 1 else metric


def unit(metric: str) -> str:
    """Of a metric's changes, in words."""
    if metric in RATIOS:
        return "× the whole model's"
    return "nats" if metric.startswith("kl.") else "percentage points" if scale(metric) != 1 else "change"


def scale(metric: str) -> float:
    """What a value is multiplied by for people: shares are shown in per cent, their changes in points."""
    return 100.0 if metric.startswith(SHARES) else 1.0


def shown_change(result: KnockoutResult, metric: str) -> str:
    """A change with its interval, ``×1.048 [1.026, 1.070]`` or ``−12.5 [−25.0, +3.1]``; a dash where there is none."""
    change = result.change.get(metric)
    if metric in RATIOS and change is not None:
        return f"×{shown(change)}"
    return shown(change, scale(metric), sign=not metric.startswith("kl."))


def shown(score: Score | None, times: float = 1.0, sign: bool = False) -> str:
    """``1.048 [1.026, 1.070]``, all three multiplied for people; infinite values as ∞."""
    if score is None:
        return "–"
    digits = 3 if times == 1 else 1
    value, low, high = (shown_number(x * times, digits, sign) for x in (score.value, score.low, score.high))
    return f"{value} [{low}, {high}]"


def shown_number(x: float, digits: int = 3, sign: bool = False) -> str:
    """So many decimals, large numbers by their power of ten, ∞ and undefined by their names."""
    if math.isnan(x):
        return "undefined"
    if math.isinf(x):
        return "∞" if x > 0 else "−∞"
    rounded = round(x, digits) + 0.0  # −0 is 0
    plain = f"{x:.3g}" if abs(x) >= LARGE else f"{rounded:{'+' if sign and rounded else ''}.{digits}f}"
    return plain.replace("-", "−").replace("e+", "e")


# ------------------------------------------------------------------------------------------ for machines
def as_csv(results: Sequence[KnockoutResult], by: str = "") -> str:
    """A row for each result, the whole model first; shares as shares, infinite as ``inf``, not measured as nothing."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    scores = list(dict.fromkeys(name for r in results for name in r.scores))
    changes = list(dict.fromkeys(name for r in results for name in r.change))
    columns = [f"{n}{end}" for n in scores for end in ("", ".low", ".high", ".n")]
    writer.writerow([*FACTS, *columns, *(f"{n}.change{end}" for n in changes for end in ("", ".low", ".high"))])
    for r in [baseline(results), *ranked(results, ordered_metrics(results, by)[0])]:
        facts = (r.strategy, r.component, r.layer, r.part, r.size, r.control, r.seconds)
        taken = [x for n in scores for x in _cells(r.scores.get(n))]
        writer.writerow([*facts, *taken, *(x for n in changes for x in _cells(r.change.get(n))[:3])])
    return file.getvalue()


def _cells(score: Score | None) -> list[Any]:
    return [""] * 4 if score is None else [score.value, score.low, score.high, score.n]


def as_json(results: Sequence[KnockoutResult], by: str = "") -> dict[str, Any]:
    """``baseline``, ``results`` in the order of damage, ``metrics``, the ordering one first; infinite as a string."""
    names = ordered_metrics(results, by)
    ordered = [baseline(results), *ranked(results, names[0])]
    whole, *others = (json.loads(r.model_dump_json()) for r in ordered)
    return {"metrics": names, "baseline": whole, "results": others}


# -------------------------------------------------------------------------------------------- for papers
def markdown(made: Table) -> str:
    """A Markdown table; numbers to the right."""
    columns, rows = made
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines) + "\n"


def latex(made: Table, title: str) -> str:
    """A table that LaTeX takes with the package booktabs, captioned with the title."""
    columns, rows = made
    lines = [" & ".join(map(escaped, row)) + r" \\" for row in [columns, *rows]]
    middle = [lines[0], r"\midrule", *lines[1:]]
    body = "\n".join([r"\toprule", *middle, r"\bottomrule"])
    return (
        "% needs \\usepackage{booktabs}\n\\begin{table}\n\\centering\n"
        f"\\caption{{{escaped(title)}}}\n\\begin{{tabular}}{{l{'r' * (len(columns) - 1)}}}\n{body}\n"
        "\\end{tabular}\n\\end{table}\n"
    )


def escaped(text: str) -> str:
    """Text that LaTeX prints as it is. A bracket that begins a cell is no option of the line break before it."""
    plain = re.sub(r"[\\~^&%$#_{}−×∞]", lambda found: SPECIAL[found[0]], text).replace("–", "--")
    return f"{{{plain}}}" if plain.startswith("[") else plain
