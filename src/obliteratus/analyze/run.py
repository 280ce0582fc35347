"""Analyses of one model, from its prompts to a page: what they cost first, then one probe for all of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from obliteratus.analyze.base import AnalysisContext, Finding, analyses, analyze, try_analyses
from obliteratus.analyze.page import page
from obliteratus.analyze.pass_budget import formula_values, select_affordable
from obliteratus.core.run_folder import check_free, publish
from obliteratus.core.settings import Step
from obliteratus.core.types import PromptSet, Subject
from obliteratus.distill import find_directions
from obliteratus.probe.probe import collect_activations
from obliteratus.prompts import parts_checked

FOUND_BY = (Step(use="mean_diff"),)  # the directions that are analysed: the plainest, one for each layer


def select_analyses(names: Sequence[str]) -> tuple[Step, ...]:
    """The analyses of those names, in the registry's order; all of them for none. UserError for a name that is none."""
    wanted = {analyses[name].name for name in names} or set(analyses)
    return tuple(Step(use=name) for name in analyses if name in wanted)


@dataclass(frozen=True)
class Report:
    """Findings by name, and why other analyses did not run."""

    found: dict[str, Finding]
    skipped: dict[str, str]
    """By name, one line each; empty where all ran."""

    def to_dict(self) -> dict[str, Any]:
        """By analysis; under ``skipped``, where there are any, those that did not run, each with its reason."""
        numbers: dict[str, Any] = {name: finding.to_dict() for name, finding in self.found.items()}
        return numbers | ({"skipped": self.skipped} if self.skipped else {})


def analyze_subject(
    subject: Subject,
    prompts: PromptSet,
    steps: Sequence[Step],
    seed: int = 0,
    *,
    budget: int | None = None,
    strict: bool = True,
) -> Report:
    """Findings on activations of the fit prompts that are probed once; search prompts are held out.

    What everything costs is said before anything runs. budget: forward passes, at most, beside the probe; analyses are
    taken in from the cheapest on, and the others are skipped. strict: an analysis that cannot work on these prompts
    raises its UserError; else it is skipped too. UserError where a part of the prompts is empty or the budget below 0.
    """
    fit, held, _ = parts_checked(prompts, seed, searched=True)
    kept, skipped = select_affordable(steps, formula_values(fit, held, subject.n_layers), budget)
    acts = collect_activations(subject, fit)
    context = AnalysisContext(acts, find_directions(acts, FOUND_BY), subject, fit, held)
    if strict:
        return Report(analyze(context, kept), skipped)
    found, unable = try_analyses(context, kept)
    return Report(found, skipped | unable)


def write_report(report: Report, out: Path, title: str) -> None:
    """index.html with all plots, and analysis.json, in a folder that appears when both are whole. UserError where the
    folder is in use."""
    check_free(out)
    partial = out.with_name(out.name + ".partial")
    folder = partial / "output"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "index.html").write_text(page(report.found, title, report.skipped))
    (folder / "analysis.json").write_text(json.dumps(report.to_dict(), indent=1))
    publish(partial, out)
