"""The command `analyze`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from obliteratus.cli.options import (
    Behavior,
    Column,
    Control,
    Device,
    Dtype,
    Json,
    Model,
    Phrases,
    Plugin,
    Quiet,
    Seed,
    SplitBy,
    Target,
    Trust,
    Verbose,
    check_split_by,
    collect_sources,
    show_progress,
    start,
)

if TYPE_CHECKING:
    from obliteratus.analyze.run import AnalysisReport
    from obliteratus.core.clock import Clock

Budget = Annotated[
    int | None,
    typer.Option(help="Most forward passes beside the probe's; the cheapest analyses run, others are skipped."),
]


def analyze(
    model: Model,
    target: Target = None,
    control: Control = None,
    column: Column = None,
    behavior: Behavior = None,
    phrases: Phrases = None,
    *,
    out: Annotated[Path, typer.Option(help="Folder for index.html and analysis.json; must not exist.")],
    only: Annotated[str, typer.Option(help="Names separated by commas; by default all analyses.")] = "",
    budget: Budget = None,
    plugin: Plugin = None,
    seed: Seed = None,
    split_by: SplitBy = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: Trust = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure what is true of a model's directions: one page with all plots, and the numbers."""
    with show_progress(quiet, verbose) as clock:
        with start(clock, plugins=plugin):
            from obliteratus.analyze.pass_budget import check_budget
            from obliteratus.analyze.run import run_analysis, select_analyses, write_report
            from obliteratus.cli.jobs import add_examples
            from obliteratus.core.run_folder import check_free
            from obliteratus.core.settings import JudgeSettings
            from obliteratus.prompts import load_prompts, split_prompts
            from obliteratus.summon.load import open_subject
            from obliteratus.verify.ladder import build_judge, check_judge

            check_budget(budget)
            names = [name for name in only.split(",") if name]
            settings = JudgeSettings(behavior=behavior or "refusal", phrases=phrases or "")
            sources = collect_sources(column, target=target, control=control)
            sources = add_examples(sources, check_judge(settings))
            steps, by = select_analyses(names), check_split_by(split_by)
            check_free(out)
            splits = split_prompts(load_prompts(**sources), seed or 0, uses_search_split=True, split_by=by)
        with clock.time("SUMMON"):
            subject = open_subject(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        with clock.time("ANALYZE"):
            judge = build_judge(settings, subject)
            report = run_analysis(subject, splits, steps, judge=judge, budget=budget, strict=bool(names))
        with clock.time("REPORT"):
            write_report(report, out, f"Analysis of {model}")
    _show(report, out, clock, json)


def _show(report: AnalysisReport, out: Path, clock: Clock, json: bool) -> None:
    """Print the numbers as JSON, or a paragraph for each analysis."""
    from obliteratus.cli.stage_names import format_times
    from obliteratus.cli.terminal import say, show_json, show_table

    if json:
        show_json(report.to_dict())
        return
    rows = [[name, finding.summary()] for name, finding in report.findings.items()]
    rows += [[name, f"skipped: {why}"] for name, why in report.skipped.items()]
    show_table("What was found", ["analysis", "finding"], rows)
    say(format_times(clock.account()), "Time")
    say(f"{out}/index.html", "Saved")
    say(f"open {out}/index.html in a browser: each finding with its plot and its control.", "Next")
