"""A study's results as rows, for the terminal and pages, and as CSV, JSON, Markdown and LaTeX."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from obliteratus.analyze.samples import LEVEL
from obliteratus.analyze.significance import LEAST_PAIRS
from obliteratus.core.results import Score
from obliteratus.report.html import Table
from obliteratus.study.base import KnockoutResult
from obliteratus.study.ranking import (
    RATIOS,
    baseline_result,
    damage_of,
    is_clear_damage,
    knockout_results,
    metric_names,
    name_effect,
    ordering_metric,
    rank_results,
)
from obliteratus.study.significance import NEVER_NEGATIVE, ChangedParts, find_changed_parts

WHOLE_MODEL = "whole model"
NO_SHARES = ("kl.", "perplexity")  # prefixes of scores that are no shares: changes of all others are in points
LAST_METRIC = "degenerate."  # whether answers are words at all: they mostly are, and the column tells nothing
NEGLIGIBLE_KL = 1e-6  # nats: a smaller KL is rounding
CHANCE = 0.025  # of 95 % intervals of parts without any effect: they lie beyond no change on the side of damage
LARGE = 1e5  # from here on a number's digits tell nothing, so it is shown as 1.2e7
FACTS = ("strategy", "component", "layer", "part", "size", "control", "seconds")
LATEX_CHARACTERS = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "−": "$-$",
    "×": r"$\times$",
    "∞": r"$\infty$",
    **{c: f"\\{c}" for c in "&%$#_{}"},
}


# -------------------------------------------------------------------------------------------- for people
def changes_table(
    results: Sequence[KnockoutResult], top: int | None = None, by: str = "", columns: int | None = None
) -> Table:
    """Return a row with the whole model's scores, then a row of changes for each part, the most damaging first.

    top: the most parts, and the most controls beside them. by: the metric that orders them, by default the study's
    first. columns: the most metrics. Raises UserError for a metric that was not measured.
    """
    names = ordered_metrics(results, by)[:columns]
    whole = baseline_result(results)
    rows = [[WHOLE_MODEL, "", *(format_score(whole.scores.get(n), display_scale(n)) for n in names)]]
    for result in keep_top(rank_results(results, names[0]), top):
        rows.append([part_name(result), f"{result.size:,}", *(format_change(result, n) for n in names)])
    return ["part", "parameters", *(column_heading(n) for n in names)], rows


def summarize(results: Sequence[KnockoutResult], metric: str) -> str:
    """Return one line: the part that does most damage, how many do some, and how they compare with random controls.

    No part is said to matter where none does damage beyond chance over all parts together (`find_changed_parts`).
    """
    parts = [r for r in rank_results(results, metric) if not r.control and metric in r.change]
    if not parts:
        return "no part has been knocked out yet"
    changed = find_changed_parts(results, metric)
    harmful = find_harmful(parts, metric) if changed is None else changed.worse
    sentences = [_count_each(harmful, parts, metric) if changed is None else _count_together(changed, metric)]
    if harmful:
        sentences.insert(0, f"{harmful[0].component} matters most, {format_change(harmful[0], metric)}")
        sentences.append(_compare_with_controls(results, parts, metric))
    return "; ".join(filter(None, sentences))


def find_harmful(parts: Sequence[KnockoutResult], metric: str) -> list[KnockoutResult]:
    """Return the parts that do damage by their own intervals; of a KL, which always rises, those that are no rounding.

    For results that cannot be tested together.
    """
    if metric in NEVER_NEGATIVE:
        return [r for r in parts if damage_of(r, metric) >= NEGLIGIBLE_KL]
    return [r for r in parts if is_clear_damage(r.change[metric], metric)]


def _count_together(changed: ChangedParts, metric: str) -> str:
    tested = f"{changed.parts} parts, {changed.items} items, level {LEVEL:g} over all parts"
    if changed.items < LEAST_PAIRS:
        tested += f"; fewer than {LEAST_PAIRS} items show nothing"
    counts = [f"{len(changed.worse)} of {changed.parts} parts do damage" if changed.worse else ""]
    counts.append(f"{len(changed.better)} of {changed.parts} parts improve {metric}" if changed.better else "")
    found = " and ".join(filter(None, counts)) or f"no part changes {metric}"
    return f"{found} beyond chance ({tested})"


def _count_each(harmful: Sequence[KnockoutResult], parts: Sequence[KnockoutResult], metric: str) -> str:
    if metric in NEVER_NEGATIVE:
        return "" if harmful else f"no part changes {metric} by {NEGLIGIBLE_KL:g} nats"
    effect = name_effect(metric)
    if not harmful:
        return f"no part changes {metric} beyond chance: of {len(parts)} intervals none shows {effect} only"
    by_chance = f"{CHANCE * len(parts):.1f} would by chance"
    return f"{len(harmful)} of {len(parts)} parts show {effect} only, each by its own 95 % interval ({by_chance})"


def _compare_with_controls(results: Sequence[KnockoutResult], parts: Sequence[KnockoutResult], metric: str) -> str:
    controls = [damage_of(r, metric) for r in knockout_results(results) if r.control and metric in r.change]
    worse = sum(damage_of(r, metric) > max(controls, default=0.0) for r in parts)
    return f"{worse} of {len(parts)} do more damage than each of {len(controls)} random controls" if controls else ""


def comparison_table(studies: Mapping[str, Sequence[KnockoutResult]], metric: str, top: int | None = None) -> Table:
    """Return one metric's changes with a column for each study, parts ordered by the most damage in any study.

    A part is the same in two studies if strategy and component are equal.
    """
    by_part: dict[tuple[str, str], dict[str, KnockoutResult]] = {}
    for study, results in studies.items():
        for result in knockout_results(results):
            if metric in result.change:
                by_part.setdefault((result.strategy, result.component), {})[study] = result
    ordered = sorted(by_part.values(), key=lambda by_study: -max(damage_of(r, metric) for r in by_study.values()))
    rows = [
        [
            part_name(next(iter(by_study.values()))),
            *(format_change(by_study[s], metric) if s in by_study else "–" for s in studies),
        ]
        for by_study in ordered[:top]
    ]
    wholes = [format_score(baseline_result(r).scores.get(metric), display_scale(metric)) for r in studies.values()]
    return ["part", *studies], [[WHOLE_MODEL, *wholes], *rows]


def ordered_metrics(results: Sequence[KnockoutResult], by: str = "") -> list[str]:
    """Return all metrics, the ordering one first and `LAST_METRIC` last. Raises UserError for an unknown one."""
    first = ordering_metric(results, by)
    return sorted(metric_names(results), key=lambda name: (name != first, name.startswith(LAST_METRIC)))


def shared_metrics(studies: Mapping[str, Sequence[KnockoutResult]]) -> list[str]:
    """Return the metrics that any of the studies measured, in their order."""
    return list(dict.fromkeys(name for results in studies.values() for name in metric_names(results)))


def keep_top(ranked: Sequence[KnockoutResult], top: int | None) -> list[KnockoutResult]:
    """Return the first ``top`` parts and the first ``top`` controls, in their order."""
    if top is None:
        return list(ranked)
    kept = [[r for r in ranked if r.control == control][:top] for control in (False, True)]
    names = {r.component for group in kept for r in group}
    return [r for r in ranked if r.component in names]


def part_name(result: KnockoutResult) -> str:
    """Return the component's name, marked if it is a control."""
    return f"{result.component} (control)" if result.control else result.component


def column_heading(metric: str) -> str:
    """Return a metric with its unit, ``refusal.target, %``; ratios show theirs (×) in each cell."""
    if metric.startswith("kl."):
        return f"{metric}, nats"
    return f"{metric}, %" if display_scale(metric) != 1 else metric


def change_unit(metric: str) -> str:
    """Return the unit of a metric's changes in words."""
    if metric in RATIOS:
        return "× the whole model's"
    return "nats" if metric.startswith("kl.") else "percentage points" if display_scale(metric) != 1 else "change"


def display_scale(metric: str) -> float:
    """Return the factor for display: shares are shown in per cent, and their changes in points."""
    return 1.0 if metric.startswith(NO_SHARES) else 100.0


def format_change(result: KnockoutResult, metric: str) -> str:
    """Return a change with its interval, ``×1.048 [1.026, 1.070]`` or ``−12.5 [−25.0, +3.1]``; a dash for none."""
    change = result.change.get(metric)
    if metric in RATIOS and change is not None:
        return f"×{format_score(change)}"
    return format_score(change, display_scale(metric), sign=not metric.startswith("kl."))


def format_score(score: Score | None, scale: float = 1.0, sign: bool = False) -> str:
    """Return a score with its interval, ``1.048 [1.026, 1.070]``, multiplied by ``scale``; a dash if there is none."""
    if score is None:
        return "–"
    digits = 3 if scale == 1 else 1
    value, low, high = (format_number(x * scale, digits, sign) for x in (score.value, score.low, score.high))
    return f"{value} [{low}, {high}]" if score.has_interval else value


def format_number(x: float, digits: int = 3, sign: bool = False) -> str:
    """Return a number with so many decimals, with a power of ten if it is large, or ∞ or undefined."""
    if math.isnan(x):
        return "undefined"
    if math.isinf(x):
        return "∞" if x > 0 else "−∞"
    rounded = round(x, digits) + 0.0  # turns −0 into 0
    plain = f"{x:.3g}" if abs(x) >= LARGE else f"{rounded:{'+' if sign and rounded else ''}.{digits}f}"
    return plain.replace("-", "−").replace("e+", "e")


# ------------------------------------------------------------------------------------------ for machines
def to_csv(results: Sequence[KnockoutResult], by: str = "") -> str:
    """Return a row per result, the whole model first; shares are fractions, infinite is ``inf``, missing is empty."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    scores = list(dict.fromkeys(name for r in results for name in r.scores))
    changes = list(dict.fromkeys(name for r in results for name in r.change))
    columns = [f"{n}{end}" for n in scores for end in ("", ".low", ".high", ".n")]
    writer.writerow([*FACTS, *columns, *(f"{n}.change{end}" for n in changes for end in ("", ".low", ".high"))])
    for r in [baseline_result(results), *rank_results(results, ordered_metrics(results, by)[0])]:
        facts = (r.strategy, r.component, r.layer, r.part, r.size, r.control, r.seconds)
        cells = [x for n in scores for x in _csv_cells(r.scores.get(n))]
        writer.writerow([*facts, *cells, *(x for n in changes for x in _csv_cells(r.change.get(n))[:3])])
    return file.getvalue()


def _csv_cells(score: Score | None) -> list[Any]:
    return [""] * 4 if score is None else [score.value, score.low, score.high, score.n]


def to_json(results: Sequence[KnockoutResult], by: str = "") -> dict[str, Any]:
    """Return ``metrics``, the ordering one first, ``baseline``, and ``results`` by damage; infinite is a string."""
    names = ordered_metrics(results, by)
    ordered = [baseline_result(results), *rank_results(results, names[0])]
    whole, *others = (json.loads(r.model_dump_json(exclude={"differences"})) for r in ordered)
    return {"metrics": names, "baseline": whole, "results": others}


# -------------------------------------------------------------------------------------------- for papers
def to_markdown(table: Table) -> str:
    """Return a Markdown table with numbers aligned to the right."""
    columns, rows = table
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines) + "\n"


def to_latex(table: Table, title: str) -> str:
    """Return a LaTeX table for the package booktabs, with the title as its caption."""
    columns, rows = table
    lines = [" & ".join(map(escape_latex, row)) + r" \\" for row in [columns, *rows]]
    middle = [lines[0], r"\midrule", *lines[1:]]
    body = "\n".join([r"\toprule", *middle, r"\bottomrule"])
    return (
        "% needs \\usepackage{booktabs}\n\\begin{table}\n\\centering\n"
        f"\\caption{{{escape_latex(title)}}}\n\\begin{{tabular}}{{l{'r' * (len(columns) - 1)}}}\n{body}\n"
        "\\end{tabular}\n\\end{table}\n"
    )


def escape_latex(text: str) -> str:
    """Return text that LaTeX prints as it is."""
    plain = re.sub(r"[\\~^&%$#_{}−×∞]", lambda match: LATEX_CHARACTERS[match[0]], text).replace("–", "--")
    # a leading bracket would be read as an option of the line break before it
    return f"{{{plain}}}" if plain.startswith("[") else plain
