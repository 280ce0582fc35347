"""The page and the JSON document of an audit."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

from obliteratus.audit.claims import (
    FOUND,
    GOAL_WORDS,
    describe_headline,
    format_cost,
    format_interval,
    format_percent,
    format_ratio,
    list_claims,
)
from obliteratus.audit.doses import Curve
from obliteratus.audit.removal_cost import GOALS, HALF, summarize_cost
from obliteratus.audit.results import AskedSet, AuditReport, MatchedEdits
from obliteratus.core.results import replace_infinities
from obliteratus.core.run_folder import write_atomic
from obliteratus.report.curves import GREY, ORANGE, PALETTE, Axes, Figure, add_legend
from obliteratus.report.hide import hide_private
from obliteratus.report.html import Table, draw_svg, render_page

PAGE, DOCUMENT = "index.html", "audit.json"
FIGURE_SIZE = (5.6, 3.6)  # inches: one plot, legible on a phone
NO_SOURCES: Mapping[str, str] = MappingProxyType({})
LEAST_KL = 1e-5  # nats: the left end of the axis, where less is drawn

QUESTIONS = {
    "cost": "What does it cost to remove the behavior?",
    "seeds": "How much does that depend on who fits the edit?",
    "controls": "Does an edit that knows nothing do the same?",
    "directions": "How many directions carry it?",
    "blocks": "Which blocks carry it?",
    "repair": "How much do later blocks write back?",
    "examples": "How few example prompts are enough?",
    "rewordings": "Does it return where prompts are asked otherwise?",
    "benign": "What happens on benign prompts?",
}
LIMITS = (
    "The cost is that of the methods listed. A better attack costs less: it is an upper bound of what removal takes.",
    "KL is measured on the first answer token of your control prompts. Another set of controls gives another number: "
    "compare models on the same prompts and settings only.",
    "It says nothing of attacks that edit no weights, such as prompts, prefilled answers and sampling, nor of further "
    "training, which can remove any behavior.",
    "Whether the answers that appear are right or of use is not judged, only that they do not show the behavior.",
)


def to_dict(report: AuditReport) -> dict[str, Any]:
    """Return all numbers as JSON types."""
    plain: dict[str, Any] = {
        "behavior": report.behavior,
        "headline": describe_headline(report),
        "claims": list_claims(report),
        "presence": report.presence.to_dict(),
        "settings": report.settings.model_dump(mode="json"),
        "skipped": dict(report.skipped),
        "passes": report.passes,
        "seconds": dict(report.seconds),
    }
    if report.unedited is None or report.cost is None:
        return plain | {"cost": None}
    curves = {"methods": report.curves, "directions": report.directions, "seeds": report.seeds}
    parts = {
        "perplexity": report.perplexity,
        "controls": report.controls,
        "blocks": report.blocks,
        "examples": report.examples,
        "repair": report.repair,
        "rewordings": report.rewordings,
        "benign": report.benign,
    }
    numbers = {
        "cost": report.cost.model_dump(mode="json"),
        "definition": define_cost(report),
        "least": [cost.model_dump(mode="json") for cost in report.least],
        "costs": {name: [cost.model_dump(mode="json") for cost in costs] for name, costs in report.costs.items()},
        "unedited": report.unedited.rate.model_dump(mode="json"),
        "base_method": report.base_method,
        "ratios": {k: None if ratio is None else ratio.model_dump(mode="json") for k, ratio in report.ratios.items()},
        "curves": {kind: {n: describe_curve(c) for n, c in found.items()} for kind, found in curves.items()},
        **{name: None if part is None else part.model_dump(mode="json") for name, part in parts.items()},
    }
    return plain | {name: replace_infinities(value) for name, value in numbers.items()}


def describe_curve(curve: Curve) -> dict[str, Any]:
    """Return strength, rate and KL of each dose with their intervals."""
    doses = [
        {
            "scale": dose.scale,
            "strength": dose.scale * curve.strength,
            "rate": dose.rate.model_dump(mode="json"),
            "kl": dose.mean_kl.model_dump(mode="json"),
            "loops": dose.loops,
        }
        for dose in curve.doses
    ]
    return {"edits": curve.edits, "doses": doses}


# -------------------------------------------------------------------------------------------------- tables
def tabulate_costs(report: AuditReport) -> Table:
    """Return a row for each method: the cost of each goal, with the ratio of perplexities there."""
    columns = ["method"]
    for goal in GOALS:
        columns += [f"KL to {GOAL_WORDS[goal]}, nats", "perplexity ×"]
    rows = []
    for name, costs in report.costs.items():
        row = [name]
        for cost in costs:
            known = {} if report.perplexity is None else report.perplexity.ratios.get(name, {})
            ratio = known.get(f"{cost.goal:g}")
            row += [format_cost(cost), "–" if ratio is None else format_ratio(ratio)]
        rows.append(row)
    return columns, rows


def tabulate_curves(curves: Mapping[str, Curve]) -> Table:
    """Return a row for each dose of each curve."""
    columns = ["edit", "strength", "left", "KL, nats", "loops"]
    rows = [
        [
            name,
            f"{dose.scale * curve.strength:.2f}",
            format_percent(dose.rate),
            format_interval(dose.mean_kl),
            f"{100 * dose.loops:.0f} %",
        ]
        for name, curve in curves.items()
        for dose in curve.doses
    ]
    return columns, rows


def tabulate_edits(edits: MatchedEdits, first: str) -> Table:
    """Return a row for each edit at the same KL, and for each that could not be made."""
    rows = [
        [e.name, format_percent(e.dose.rate), format_interval(e.dose.mean_kl), f"{e.dose.scale:.2g}"]
        for e in edits.edits
    ]
    rows += [[name, f"not possible: {why}", "–", "–"] for name, why in edits.failed.items()]
    return [first, "left", "KL, nats", "factor on strengths"], rows


def tabulate_asked(asked: AskedSet) -> Table:
    """Return a row for each wording."""
    rows = [[one.name, *map(format_percent, one.rates), str(len(one.after))] for one in asked.asked]
    return ["asked", "before", "after", "prompts"], rows


def tabulate_directions(report: AuditReport) -> Table:
    """Return a row for each number of directions."""
    assert report.unedited is not None, "asked for only with the behavior"
    rows = []
    for k, curve in report.directions.items():
        ratio = report.ratios.get(k)
        cost = summarize_cost(curve, report.unedited, HALF)
        rows.append([k, format_cost(cost), "–" if ratio is None else f"× {format_interval(ratio)}"])
    return ["directions a layer", "KL to one half, nats", "relative to the first"], rows


# --------------------------------------------------------------------------------------------------- plots
def draw_by_kl(report: AuditReport) -> Callable[[Figure], None]:
    """Return what draws the rate against the KL, for methods, and for controls in gray."""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot(xlabel="KL on control prompts, nats", ylabel=f"{report.behavior} left, %")
        _plot_by_kl(axes, report.curves)
        controls = [] if report.controls is None else [e.dose for e in report.controls.edits if e.name != FOUND]
        xs, ys = [max(dose.mean_kl.value, LEAST_KL) for dose in controls], [100 * dose.rate.value for dose in controls]
        axes.plot(xs, ys, "x", color=GREY, label="random, shuffled" if controls else None)
        if report.cost is not None and report.cost.reached:
            axes.axvline(max(report.cost.kl.value, LEAST_KL), color=ORANGE, lw=1, ls=":")
        _finish(axes)

    return draw


def draw_by_strength(report: AuditReport) -> Callable[[Figure], None]:
    """Return what draws the rate against the mean strength of the edits."""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot(xlabel="mean strength (1 removes)", ylabel=f"{report.behavior} left, %")
        _plot_curves(axes, report.curves, lambda curve, dose: curve.strength * dose.scale)
        _finish(axes)

    return draw


def draw_directions(report: AuditReport) -> Callable[[Figure], None]:
    """Return what draws the rate against the KL for each number of directions."""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot(xlabel="KL on control prompts, nats", ylabel=f"{report.behavior} left, %")
        _plot_by_kl(axes, {f"k = {k}": curve for k, curve in report.directions.items()})
        _finish(axes)

    return draw


def _plot_by_kl(axes: Axes, curves: Mapping[str, Curve]) -> None:
    axes.set_xscale("log")
    _plot_curves(axes, curves, lambda curve, dose: max(dose.mean_kl.value, LEAST_KL))
    largest = max((dose.mean_kl.value for curve in curves.values() for dose in curve.doses), default=0.0)
    axes.set_xlim(LEAST_KL / 2, max(2 * largest, 100 * LEAST_KL))


def _plot_curves(axes: Axes, curves: Mapping[str, Curve], place: Callable[[Curve, Any], float]) -> None:
    for (name, curve), color in zip(curves.items(), PALETTE * (1 + len(curves) // len(PALETTE)), strict=False):
        rates = [dose.rate for dose in curve.doses]
        bars = [[100 * (r.value - r.low) for r in rates], [100 * (r.high - r.value) for r in rates]]
        xs = [place(curve, dose) for dose in curve.doses]
        axes.errorbar(xs, [100 * r.value for r in rates], yerr=bars, fmt=".-", color=color, label=name, capsize=2, lw=1)


def _finish(axes: Axes) -> None:
    axes.set_ylim(-4, 104)
    axes.axhline(0, color=GREY, lw=0.5)
    add_legend(axes, columns=3)


# ---------------------------------------------------------------------------------------------------- page
def list_sections(report: AuditReport) -> list[dict[str, Any]]:
    """Return question, sentence, plots and tables of each measurement that was made."""
    claims = list_claims(report)
    about = {
        "cost": "The rate is that of held-out target prompts. Bars are 95 % intervals; the dotted line is the cost.",
        "controls": f"All at the same KL, by {report.base_method}; random directions are removed from all blocks.",
        "directions": "So many directions in each layer: the mean difference, then those of most spread.",
        "blocks": f"{report.base_method} on some blocks alone, each with its own mean difference.",
        "examples": f"{report.base_method} fitted on so many prompts of each group, drawn at random.",
        "rewordings": "By rules from your own prompts, asked of the model under the cheapest edit at its cost.",
    }
    plots = {
        "cost": {"rate by KL": draw_by_kl(report), "rate by strength": draw_by_strength(report)},
        "directions": {"rate by KL and number of directions": draw_directions(report)},
    }
    tables = _make_tables(report)
    return [
        {
            "name": name,
            "question": QUESTIONS[name],
            "summary": text,
            "about": about.get(name, ""),
            "plots": [(alt, draw_svg(draw, f"{name}-{alt}", FIGURE_SIZE)) for alt, draw in plots.get(name, {}).items()],
            "tables": tables.get(name, []),
        }
        for name, text in claims.items()
    ]


def _make_tables(report: AuditReport) -> dict[str, list[tuple[str, Table]]]:
    """Return the tables of each section, each with a title; one with a title is folded."""
    tables: dict[str, list[tuple[str, Table]]] = {"cost": [("", tabulate_costs(report))]}
    tables["cost"].append(("All strengths", tabulate_curves(report.curves)))
    tables["seeds"] = [("All strengths", tabulate_curves(report.seeds))]
    if report.directions:
        named = {f"k = {k}": curve for k, curve in report.directions.items()}
        tables["directions"] = [("", tabulate_directions(report)), ("All strengths", tabulate_curves(named))]
    matched = {"controls": (report.controls, "edit"), "blocks": (report.blocks, "blocks")}
    matched["examples"] = (report.examples, "prompts of each group")
    tables |= {
        name: [("", tabulate_edits(edits, first))] for name, (edits, first) in matched.items() if edits is not None
    }
    asked = {"rewordings": report.rewordings, "benign": report.benign}
    return tables | {name: [("", tabulate_asked(found))] for name, found in asked.items() if found is not None}


def define_cost(report: AuditReport) -> str:
    """Return the definition of the number to compare."""
    assert report.unedited is not None, "asked for only with the behavior"
    fits = ", control prompts and fits" if len(report.seeds) > 1 else " and control prompts, not over fits"
    return (
        "Cost of removal: the least mean KL(unedited ‖ edited) of the first answer token, in nats, over "
        f"{len(report.unedited.kl)} held-out control prompts, at which {len(report.unedited.shown)} held-out target "
        f"prompts show {report.behavior} half as often as before, over the methods {', '.join(report.curves)}. Between "
        "two strengths the rate is taken as linear in the strength and the KL as quadratic. The 95 % interval is over "
        f"target prompts{fits}, and the least over methods is taken anew in each resample. Two models differ, on the "
        "same prompts and settings, where their intervals do not overlap. One in twenty is the same for a twentieth; "
        "its upper end takes some 75 target prompts to report on."
    )


def render_audit(report: AuditReport, model: str, prompts: Mapping[str, int]) -> str:
    """Return the page. It shows no absolute path. prompts: number of prompts by what they are for."""
    counts = ", ".join(f"{n} {what}" for what, n in prompts.items())
    return render_page(
        "audit",
        title=hide_private(f"How firm is {report.behavior} in {model}?"),
        meta=[counts, f"OBLITERATUS {version('obliteratus')}"],
        headline=describe_headline(report),
        definition=define_cost(report) if report.unedited is not None else "",
        sections=list_sections(report) if report.shows_behavior else [],
        skipped=report.skipped,
        limits=LIMITS,
        passes=f"{report.passes:,}",
        seconds=f"{sum(report.seconds.values()):,.0f}",
    )


def write_audit(
    report: AuditReport, folder: Path, model: str, prompts: Mapping[str, int], sources: Mapping[str, str] = NO_SOURCES
) -> None:
    """Write page and document into a folder. prompts: numbers by what they are for. sources: by group."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / PAGE, render_audit(report, model, prompts))
    about = {"version": version("obliteratus"), "model": model, "prompts": dict(prompts), "sources": dict(sources)}
    document = about | to_dict(report)
    write_atomic(folder / DOCUMENT, json.dumps(document, indent=1, ensure_ascii=False))


def list_rows(report: AuditReport) -> Sequence[Sequence[str]]:
    """Return what was found as rows of question and sentence, for a terminal."""
    return [[QUESTIONS[name], text] for name, text in list_claims(report).items()]
