"""What analyses are given, around activations with a known truth; and how figures are drawn in tests."""

from __future__ import annotations

import io
import json
from functools import cache
from typing import Any

import torch
from tests.support.planted import PROMPTS, group, planted
from tests.support.tiny import tiny_subject

from obliteratus.analyze import AnalysisContext, Finding
from obliteratus.causal.interventions import FitContext
from obliteratus.core.settings import Step
from obliteratus.core.types import Activations, Directions, Prompt, PromptSet, Subject
from obliteratus.distill import find_directions

NOTHING = PromptSet({"target": (), "control": ()})


@cache
def subject() -> Subject:
    """A tiny model, for analyses that never look at it."""
    return tiny_subject("llama")


def ground_of(
    acts: Activations, directions: Directions | None = None, prompts: PromptSet = NOTHING, model: Subject | None = None
) -> AnalysisContext:
    """The mean differences, unless other directions are given."""
    found = find_directions(acts, [Step(use="mean_diff")]) if directions is None else directions
    return AnalysisContext(acts, found, FitContext(model or subject(), prompts), NOTHING)


def null(seed: int = 0, n: int = PROMPTS) -> Activations:
    """Two groups of one population."""
    return planted(seed, shift=0.0, n=n)[0]


def of(target: torch.Tensor, control: torch.Tensor) -> Activations:
    """Activations of these rows."""
    return Activations({"target": group(target), "control": group(control)}, -1)


def categories(*names: str) -> PromptSet:
    """Target prompts of these categories."""
    return PromptSet({"target": tuple(Prompt(f"{i}", category=c) for i, c in enumerate(names)), "control": ()})


def tells(finding: Finding) -> dict[str, Any]:
    """Its numbers, after the contract of every finding was checked: JSON holds them, one line, a plot with labels."""
    from matplotlib.figure import Figure

    numbers = json.loads(json.dumps(finding.numbers(), allow_nan=False))
    assert isinstance(numbers, dict)
    assert finding.told()
    assert "\n" not in finding.told()
    figure = Figure(figsize=(7, 4), layout="constrained")
    finding.draw(figure)
    plots = [a for a in figure.axes if a.get_label() != "<colorbar>"]
    assert plots
    assert all(a.get_xlabel() and a.get_ylabel() for a in plots)
    figure.savefig(io.BytesIO(), format="svg")
    return numbers
