"""Views of what `core` defines: plans, directions, activations and models as tables, HTML and plots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from obliteratus.core.types import Activations, Change, Directions, Edit, Plan, PromptSet, Shift, Site, Subject
from obliteratus.core.views import Rows, View, register_view
from obliteratus.report.curves import PALETTE, Figure, add_legend, plot_curve
from obliteratus.report.html import render_page

MOST = 20  # rows that a notebook's cell shows; more would push what follows out of sight


def make_view(
    tabulate: Callable[[Any], Rows],
    draw: Callable[[Any, Figure], None] | None = None,
    show: Callable[[Any], tuple[str, Rows]] | None = None,
) -> View:
    """Return a view of a table and a drawing. show: returns title and rows of the HTML, if not those of the table."""

    def render(shown: Any) -> str:
        title, (columns, rows) = show(shown) if show else (shown.describe(), tabulate(shown))
        return render_table(f"{type(shown).__name__}: {title}", columns, rows)

    def draw_shown(shown: Any) -> Any:
        from obliteratus.report.figure import draw_figure  # imports matplotlib, which takes half a second

        assert draw is not None, "it is asked for only where there is one"
        return draw_figure(draw, shown)

    return View(tabulate, render, draw_shown if draw else None)


def render_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return the first rows of a table as HTML under a title."""
    cells = [[format_cell(cell) for cell in row] for row in rows[:MOST]]
    return render_page("notebook", title=title, columns=columns, rows=cells, left=max(0, len(rows) - MOST))


def format_cell(cell: Any) -> str:
    """Return a number with as many digits as tell something, and anything else as text; '' for None."""
    if cell is None:
        return ""
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


# ------------------------------------------------------------------------------------------ plans
def tabulate_plan(plan: Plan) -> Rows:
    """Return a row for each change, in the order in which they are made."""
    columns = ["layer", "part", "change", "strength", "directions", "norm", "path"]
    return columns, [_describe_change(change) for change in plan.edits]


def _describe_change(change: Change) -> list[Any]:
    site, kind = change.site, type(change).__name__.lower()
    if isinstance(change, Edit):
        return [site.layer, site.part, kind, change.strength, len(change.basis), change.norm, site.path]
    strength = float(change.vector.norm()) if isinstance(change, Shift) else None
    return [site.layer, site.part, kind, strength, None, None, site.path]


def draw_plan(plan: Plan, figure: Figure) -> None:
    """Draw the strength of each edit over the blocks, a line for each part."""
    axes = figure.add_subplot(xlabel="block (−1: embeddings)", ylabel="strength", title="where the model is edited")
    edits = [change for change in plan.edits if isinstance(change, Edit)]
    for color, part in zip(PALETTE, dict.fromkeys(edit.site.part for edit in edits), strict=False):
        own = [(edit.site.layer, edit.strength) for edit in edits if edit.site.part == part]
        axes.plot([x for x, _ in own], [y for _, y in own], "o", color=color, label=part)
    axes.locator_params(axis="x", integer=True)
    if edits:
        add_legend(axes)
        axes.set_title("")


# ------------------------------------------------------------------------------------- directions
def tabulate_directions(directions: Directions) -> Rows:
    """Return a row for each stream: its score, the extractor's own measure, and how many directions it has."""
    found = directions.basis.norm(dim=-1).gt(0).sum(-1)
    columns = ["stream", "score", f"raw ({directions.unit})", "directions"]
    values = zip(directions.score.tolist(), directions.raw.tolist(), found.tolist(), strict=True)
    return columns, [[i, *row] for i, row in enumerate(values)]


def draw_directions(directions: Directions, figure: Figure) -> None:
    """Draw the score over the streams."""
    axes = figure.add_subplot(xlabel="stream", ylabel="score", title=" → ".join(directions.trace))
    plot_curve(axes, directions.score, "share of the length that is difference")
    axes.set_ylim(bottom=0)


# ------------------------------------------------------------------------------------ activations
def tabulate_activations(acts: Activations) -> Rows:
    """Return a row for each group: prompts, what is kept of them, and the length of the mean at the last stream."""
    columns = ["group", "prompts", "kept", "categories", "length of the mean, last stream"]
    rows = []
    for name, group in acts.groups.items():
        kept = "every prompt" if group.rows is not None else "a sketch" if group.sketch is not None else "the mean"
        rows.append([name, group.count, kept, len({*group.categories} - {""}), float(group.mean[-1].norm())])
    return columns, rows


def draw_activations(acts: Activations, figure: Figure) -> None:
    """Draw the length of each group's mean over the streams, and that of the difference of target and control."""
    axes = figure.add_subplot(xlabel="stream", ylabel="length", yscale="log")
    means = {name: group.mean for name, group in acts.groups.items()}
    if {"target", "control"} <= means.keys():
        means["target − control"] = means["target"] - means["control"]
    for color, (name, mean) in zip(PALETTE, means.items(), strict=False):
        plot_curve(axes, mean.norm(dim=1).clamp(min=torch.finfo(mean.dtype).tiny), name, color)
    add_legend(axes, columns=len(means))


# ----------------------------------------------------------------------------------------- models
def tabulate_subject(subject: Subject) -> Rows:
    """Return a row for each part that can be edited: its role, number of sites, and the blocks that have it."""
    parts: dict[str, list[Site]] = {}
    for site in subject.sites:
        parts.setdefault(site.part, []).append(site)
    rows = [[part, sites[0].role, len(sites), _name_blocks(sites)] for part, sites in parts.items()]
    return ["part", "role", "sites", "blocks"], rows


def _name_blocks(sites: Sequence[Site]) -> str:
    layers = sorted({site.layer for site in sites})
    return f"{layers[0]}–{layers[-1]}" if len(layers) > 1 else str(layers[0])


# ---------------------------------------------------------------------------------------- prompts
def tabulate_prompts(prompts: PromptSet) -> Rows:
    """Return a row for each prompt."""
    columns = ["group", "prompt", "category", "split"]
    rows = [[name, p.text, p.category, p.split] for name, members in prompts.groups.items() for p in members]
    return columns, rows


register_view(PromptSet, make_view(tabulate_prompts))
register_view(Plan, make_view(tabulate_plan, draw_plan))
register_view(Directions, make_view(tabulate_directions, draw_directions))
register_view(Activations, make_view(tabulate_activations, draw_activations))
register_view(Subject, make_view(tabulate_subject))
