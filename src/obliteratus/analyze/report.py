"""Analyses of one model, from its prompts to a page: what they cost first, then one probe for all of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import reduce
from operator import add
from pathlib import Path

from obliteratus.analyze.base import Finding, Ground, analyses, analyze
from obliteratus.analyze.page import page
from obliteratus.distill import distill
from obliteratus.probe import probe
from obliteratus.progress import note
from obliteratus.prompts import parts_checked
from obliteratus.settings import Step
from obliteratus.store import check_free, publish
from obliteratus.tune.lab import Lab
from obliteratus.types import PromptSet, Subject
from obliteratus.work import Cost, n_of

FOUND_BY = (Step(use="mean_diff"),)  # the directions that are analysed: the plainest, one for each layer


def chosen(names: Sequence[str]) -> tuple[Step, ...]:
    """The analyses of those names, in the registry's order; all of them for none. UserError for a name that is none."""
    wanted = {analyses[name].name for name in names} or set(analyses)
    return tuple(Step(use=name) for name in analyses if name in wanted)


def cost_of(steps: Sequence[Step]) -> Cost:
    """The most that probing and the analyses ask of the model."""
    each = (analyses[s.use].cost(analyses.check(s.use, s.options)) for s in steps)
    return reduce(add, each, Cost(n_of("fit")))


def analysed(subject: Subject, prompts: PromptSet, steps: Sequence[Step], seed: int = 0) -> dict[str, Finding]:
    """Findings by name, on activations of the fit prompts that are probed once; search prompts are held out.

    UserError where a part of the prompts is empty.
    """
    fit, held, _ = parts_checked(prompts, seed, searched=True)
    note("cost", f"at most {cost_of(steps)}")
    acts = probe(subject, fit)
    return analyze(Ground(acts, distill(acts, FOUND_BY), Lab(subject, fit), held), steps)


def write(found: dict[str, Finding], out: Path, title: str) -> None:
    """index.html with all plots, and analysis.json, in a folder that appears when both are whole. UserError where the
    folder is in use."""
    check_free(out)
    partial = out.with_name(out.name + ".partial")
    folder = partial / "output"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "index.html").write_text(page(found, title))
    numbers = {name: finding.numbers() for name, finding in found.items()}
    (folder / "analysis.json").write_text(json.dumps(numbers, indent=1))
    publish(partial, out)
