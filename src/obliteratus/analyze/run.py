"""Run analyses of one model: estimate their cost, probe once for all of them, and write one page of the findings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from obliteratus.analyze.base import AnalysisContext, Finding, analyses, analyze, try_analyses
from obliteratus.analyze.page import findings_page
from obliteratus.analyze.pass_budget import formula_values, select_affordable
from obliteratus.core.run_folder import check_free, publish
from obliteratus.core.settings import Step
from obliteratus.core.types import PromptSet, Splits, Subject
from obliteratus.distill import find_directions
from obliteratus.judge.judge import Judge
from obliteratus.probe.probe import collect_activations
from obliteratus.prompts import split_prompts

DISTILL_STEPS = (Step(use="mean_diff"),)  # gives the directions that are analyzed: the simplest, one for each stream


def select_analyses(names: Sequence[str]) -> tuple[Step, ...]:
    """Return the named analyses in the registry's order, or all of them if no name is given.

    Raises UserError for an unknown name.
    """
    wanted = {analyses[name].name for name in names} or set(analyses)
    return tuple(Step(use=name) for name in analyses if name in wanted)


@dataclass(frozen=True)
class Report:
    """The findings of a model's analyses."""

    findings: dict[str, Finding]
    skipped: dict[str, str]
    """For each analysis that did not run, the reason in one line."""
    about: tuple[str, ...] = ()
    """Date, precision, behavior and numbers of prompts, for the page."""

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers by analysis, and under ``skipped``, if any analysis did not run, the reasons."""
        numbers: dict[str, Any] = {name: finding.to_dict() for name, finding in self.findings.items()}
        return numbers | ({"skipped": self.skipped} if self.skipped else {})


def analyze_subject(
    subject: Subject,
    prompts: PromptSet | Splits,
    steps: Sequence[Step],
    seed: int = 0,
    *,
    judge: Judge | None = None,
    budget: int | None = None,
    strict: bool = True,
) -> Report:
    """Run the analyses on activations of the fit prompts; the search prompts are held out.

    The cost of everything is noted before anything runs.

    prompts: split by the seed unless they are split already.
    judge: says which answers show the behavior; None looks for refusals.
    budget: the most forward passes, not counting the probe's; the cheapest analyses run and the others are skipped.
    strict: whether an analysis that cannot work on these prompts raises its UserError or is skipped.
    Raises UserError for prompts that `split_prompts` refuses, or a budget below 0.
    """
    splits = prompts if isinstance(prompts, Splits) else split_prompts(prompts, seed, uses_search_split=True)
    chosen, skipped = select_affordable(steps, formula_values(splits.fit, splits.search, subject.n_layers), budget)
    acts = collect_activations(subject, splits.fit)
    context = AnalysisContext(
        acts, find_directions(acts, DISTILL_STEPS), subject, splits.fit, splits.search, judge or Judge()
    )
    about = describe_data(context)
    if strict:
        return Report(analyze(context, chosen), skipped, about)
    findings, failures = try_analyses(context, chosen)
    return Report(findings, skipped | failures, about)


def describe_data(context: AnalysisContext) -> tuple[str, ...]:
    """Return what is analyzed: the date, the precision, the behavior and the numbers of prompts."""
    source, prompts = context.subject.source, context.prompts
    date = context.subject.chat.now.strftime("%Y-%m-%d %H:%M")
    counts = f"{len(prompts['target'])} target and {len(prompts['control'])} control prompts to fit on"
    held_out = ", ".join(
        f"{len(context.held_out[g])} {g}" for g in ("target", "control") if g in context.held_out.groups
    )
    return date, source.quantization or source.dtype, context.judge.name, counts, f"held out: {held_out}"


def write_report(report: Report, out: Path, title: str) -> None:
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
