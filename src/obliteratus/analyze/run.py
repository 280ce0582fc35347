"""Run analyses of one model: estimate their cost, probe once for all of them, and write one page of the findings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from obliteratus.analyze.base import AnalysisContext, Finding, analyses, analyze, try_analyses
from obliteratus.analyze.page import SCORE, findings_page, flatten_numbers
from obliteratus.analyze.pass_budget import formula_values, select_affordable
from obliteratus.core.errors import UserError, unknown_name
from obliteratus.core.progress import shows_progress
from obliteratus.core.run_folder import check_free, publish
from obliteratus.core.settings import Step
from obliteratus.core.types import PromptSet, Splits, Subject
from obliteratus.core.views import Rows, Viewable, register_view
from obliteratus.distill import find_directions
from obliteratus.judge.judge import Judge
from obliteratus.probe.probe import collect_activations
from obliteratus.prompts import split_prompts
from obliteratus.report.notebook import make_view

DISTILL_STEPS = (Step(use="mean_diff"),)  # gives the directions that are analyzed: the simplest, one for each stream


def select_analyses(names: Sequence[str]) -> tuple[Step, ...]:
    """Return the named analyses in the registry's order, or all of them if no name is given.

    Raises UserError for an unknown name.
    """
    wanted = {analyses[name].name for name in names} or set(analyses)
    return tuple(Step(use=name) for name in analyses if name in wanted)


@dataclass(frozen=True, repr=False)
class AnalysisReport(Viewable):
    """The findings of a model's analyses."""

    findings: dict[str, Finding]
    skipped: dict[str, str]
    """For each analysis that did not run, the reason in one line."""
    about: tuple[str, ...] = ()
    """Date, precision, behavior and numbers of prompts, for the page."""

    def __getitem__(self, name: str) -> Finding:
        """Return the finding of an analysis. Raises UserError for one that did not run."""
        if name in self.skipped:
            raise UserError(f"analysis '{name}' was skipped: {self.skipped[name]}")
        if name not in self.findings:
            raise UserError(unknown_name("finding", name, self.findings))
        return self.findings[name]

    def describe(self) -> str:
        """Return what was found by the only analysis, or the names of all, and how many were skipped."""
        lines = [f"{name}: {finding.summary()}" for name, finding in self.findings.items()]
        skipped = f"; {len(self.skipped)} skipped" if self.skipped else ""
        return (lines[0] if len(lines) == 1 else f"findings of {', '.join(self.findings) or 'nothing'}") + skipped

    def plot(self, name: str = "") -> Any:
        """Return a matplotlib figure of an analysis, by default of the first."""
        from obliteratus.report.figure import draw_figure  # imports matplotlib, which takes half a second

        shown = name or next(iter(self.findings), "")
        return draw_figure(lambda finding, figure: finding.draw(figure), self[shown])

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers by analysis, and under ``skipped``, if any analysis did not run, the reasons."""
        numbers: dict[str, Any] = {name: finding.to_dict() for name, finding in self.findings.items()}
        return numbers | ({"skipped": self.skipped} if self.skipped else {})


@shows_progress
def run_analysis(
    subject: Subject,
    prompts: PromptSet | Splits,
    steps: Sequence[Step | str] = (),
    seed: int = 0,
    *,
    judge: Judge | None = None,
    budget: int | None = None,
    strict: bool | None = None,
) -> AnalysisReport:
    """Run the analyses on activations of the fit prompts; the search prompts are held out.

    The cost of everything is noted before anything runs.

    prompts: split by the seed unless they are split already.
    steps: analyses with their options, or by name alone; none stands for all.
    judge: says which answers show the behavior; None looks for refusals.
    budget: the most forward passes, not counting the probe's; the cheapest analyses run and the others are skipped.
    strict: whether an analysis that cannot work on these prompts raises its UserError or is skipped. None: it raises if
    it was named.
    Raises UserError for prompts that `split_prompts` refuses, for an unknown analysis, or a budget below 0.

    >>> ob.run_analysis(subject, prompts, ["geometry"])  # doctest: +ELLIPSIS
    <AnalysisReport: geometry: ...>
    """
    strict = bool(steps) if strict is None else strict
    named = [Step(use=step) if isinstance(step, str) else step for step in steps]
    splits = prompts if isinstance(prompts, Splits) else split_prompts(prompts, seed, uses_search_split=True)
    chosen, skipped = select_affordable(
        named or select_analyses(()), formula_values(splits.fit, splits.search, subject.n_layers), budget
    )
    acts = collect_activations(subject, splits.fit)
    context = AnalysisContext(
        acts, find_directions(acts, DISTILL_STEPS), subject, splits.fit, splits.search, judge or Judge()
    )
    about = describe_data(context)
    if strict:
        return AnalysisReport(analyze(context, chosen), skipped, about)
    findings, failures = try_analyses(context, chosen)
    return AnalysisReport(findings, skipped | failures, about)


def describe_data(context: AnalysisContext) -> tuple[str, ...]:
    """Return what is analyzed: the date, the precision, the behavior and the numbers of prompts."""
    source, prompts = context.subject.source, context.prompts
    date = context.subject.chat.now.strftime("%Y-%m-%d %H:%M")
    counts = f"{len(prompts['target'])} target and {len(prompts['control'])} control prompts to fit on"
    held_out = ", ".join(
        f"{len(context.held_out[g])} {g}" for g in ("target", "control") if g in context.held_out.groups
    )
    return date, source.quantization or source.dtype, context.judge.name, counts, f"held out: {held_out}"


def write_report(report: AnalysisReport, out: Path, title: str) -> None:
    """Write index.html and analysis.json into a folder that appears when both files are complete.

    Raises UserError if the folder is in use.
    """
    check_free(out)
    partial = out.with_name(out.name + ".partial")
    folder = partial / "output"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "index.html").write_text(
        findings_page(report.findings, title, report.skipped, report.about), encoding="utf-8"
    )
    (folder / "analysis.json").write_text(json.dumps(report.to_dict(), indent=1), encoding="utf-8")
    publish(partial, out)


# ----------------------------------------------------------------------------------------------- view
def tabulate_report(report: AnalysisReport) -> Rows:
    """Return a row for each number of each finding, with its interval if it has one."""
    rows = [
        [name, key, *_read_value(value)]
        for name, finding in report.findings.items()
        for key, value in flatten_numbers(finding.to_dict())
    ]
    return ["analysis", "number", "value", "low", "high", "n", "unit"], rows


def _read_value(value: Any) -> list[Any]:
    if isinstance(value, dict) and set(value) == SCORE:
        return [value[key] for key in ("value", "low", "high", "n", "unit")]
    return [value, None, None, None, None]


def show_report(report: AnalysisReport) -> tuple[str, Rows]:
    """Return what ran, and the summary of each finding."""
    rows: list[list[Any]] = [[name, finding.summary()] for name, finding in report.findings.items()]
    rows += [[name, f"skipped: {why}"] for name, why in report.skipped.items()]
    return f"{len(report.findings)} findings", (["analysis", "finding"], rows)


register_view(AnalysisReport, make_view(tabulate_report, show=show_report))
