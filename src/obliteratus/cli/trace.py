"""The command `trace`: what was done to a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from obliteratus.cli.options import (
    Column,
    Control,
    Json,
    Model,
    Out,
    Quiet,
    Seed,
    Target,
    Trust,
    Verbose,
    collect_sources,
    show_progress,
    start,
)
from obliteratus.core.errors import UserError

if TYPE_CHECKING:
    from obliteratus.audit.trace import TraceReport
    from obliteratus.core.types import PromptSet

MOST_ROWS = 8  # of the table in the terminal: with all else it makes 20 lines


def trace(
    edited: Model,
    against: Annotated[str, typer.Option(help="Base model that EDITED was made from.")],
    target: Target = None,
    control: Control = None,
    column: Column = None,
    seed: Seed = None,
    out: Out = None,
    trust_remote_code: Trust = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Tell from the weights what was done to a model, and save what a plan can hold of it."""
    with show_progress(quiet, verbose) as clock:
        with start(clock):
            from obliteratus.audit.trace import trace_models
            from obliteratus.core.run_folder import check_free

            if out is not None:
                check_free(out)
            prompts = load_fit_prompts(target, control, column, seed)
        with clock.time("TRACE"):
            report = trace_models(edited, against, trust_remote_code)
        if prompts is not None and report.shared is not None:
            with clock.time("PROBE"):
                report = add_cosines(report, against, prompts, trust_remote_code)
        if out is not None:
            write_report(report, out)
    show_trace(report, out, json)


def load_fit_prompts(
    target: str | None, control: str | None, column: list[str] | None, seed: int | None
) -> PromptSet | None:
    """Return the prompts that a run would find its directions on; None if none are given."""
    if target is None and control is None:
        return None
    if target is None or control is None:
        missing = "--target" if target is None else "--control"
        raise UserError(f"trace: {missing} is missing; give both groups of prompts, or neither")
    from obliteratus.prompts import load_prompts, split_prompts

    sources = collect_sources(column, target=target, control=control)
    return split_prompts(load_prompts(**sources), seed or 0).fit


def add_cosines(report: TraceReport, base: str, prompts: PromptSet, trust_remote_code: bool = False) -> TraceReport:
    """Return the report with the cosines of its directions with the base's own."""
    from dataclasses import replace

    from obliteratus.audit.refusal import compare_directions, find_mean_differences
    from obliteratus.summon.load import open_subject

    assert report.shared is not None, "asked for only where there are projections"
    means = find_mean_differences(open_subject(base, trust_remote_code=trust_remote_code), prompts)
    return replace(report, cosines=compare_directions(report.tensors, report.shared, means))


def write_report(report: TraceReport, out: Path) -> None:
    """Write page, numbers and plan aside, and rename the folder into place."""
    from obliteratus.audit.page import write_trace
    from obliteratus.core.run_folder import publish, workspace

    with workspace(out, {"edited": report.edited, "base": report.base}, resume=True) as partial:
        write_trace(report, partial / "output")
        publish(partial, out)


def show_trace(report: TraceReport, out: Path | None, json: bool) -> None:
    """Print the document, or what was found in at most 20 lines or so."""
    from obliteratus.audit.page import (
        COLUMNS,
        PAGE,
        describe_direction,
        describe_explained,
        describe_nearest,
        describe_verdict,
        make_part_rows,
    )
    from obliteratus.cli.terminal import say, show_json, show_table

    if json:
        show_json(report.to_dict())
        return
    rows = make_part_rows(report)
    if rows:
        more = f" (the largest {MOST_ROWS} of {len(rows)} rows)" if len(rows) > MOST_ROWS else ""
        show_table(f"{report.edited} against {report.base}{more}", COLUMNS, rows[:MOST_ROWS])
    lines = {
        "Done": describe_verdict(report),
        "Plan": describe_explained(report),
        "Along": describe_direction(report),
        "Nearest": describe_nearest(report),
        "Page": f"{out}/{PAGE}" if out is not None else "",
        "Next": suggest_next(report, out),
    }
    for label, text in lines.items():
        if text:
            say(text, label)


def suggest_next(report: TraceReport, out: Path | None) -> str:
    """Return what to do next, or ''."""
    from obliteratus.audit.page import PLAN

    if out is None:
        return "--out FOLDER keeps the page, the numbers and the plan." if report.tensors else ""
    if not report.plan.edits:
        return ""
    return f"obliteratus chat {report.base} --plan {out / PLAN} turns the traced edit's strength."
