"""Analysis contexts for tests: around activations with a known truth, or around a model; and what findings must do."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from tests.support.planted import PROMPTS, make_moments, planted
from tests.support.refuser import END, REFUSAL, asked, refuser
from tests.support.tiny import tiny_subject
from torch import Tensor
from torch.nn.functional import normalize

from obliteratus.analyze import AnalysisContext, Finding
from obliteratus.core.settings import Step
from obliteratus.core.types import Activations, Directions, Prompt, PromptSet, Subject
from obliteratus.distill import find_directions
from obliteratus.inference.chat_template import render_prompts
from obliteratus.probe.probe import collect_activations

NOTHING = PromptSet({"target": (), "control": ()})


# ------------------------------------------------------------------------------------------- given activations
@cache
def tiny_llama() -> Subject:
    """Return a tiny model for analyses that never look at it."""
    return tiny_subject("llama")


def context_of_activations(
    acts: Activations, directions: Directions | None = None, prompts: PromptSet = NOTHING, model: Subject | None = None
) -> AnalysisContext:
    """Return a context of these activations, with their mean differences unless other directions are given."""
    found = find_directions(acts, [Step(use="mean_diff")]) if directions is None else directions
    return AnalysisContext(acts, found, model or tiny_llama(), prompts, NOTHING)


def one_population(seed: int = 0, n: int = PROMPTS) -> Activations:
    """Return two groups drawn from one population."""
    return planted(seed, shift=0.0, n=n)[0]


def activations_of(target: Tensor, control: Tensor) -> Activations:
    """Return activations with these rows."""
    return Activations({"target": make_moments(target), "control": make_moments(control)}, -1)


def prompts_of_categories(*names: str) -> PromptSet:
    """Return one target prompt for each category name."""
    return PromptSet({"target": tuple(Prompt(f"{i}", category=c) for i, c in enumerate(names)), "control": ()})


def stars_and_dishes(n: int = 24) -> PromptSet:
    """Return n target prompts about stars and n control prompts about dishes."""
    groups = {"target": "Tell me about star {}.", "control": "How do I cook dish {}?"}
    return PromptSet({g: tuple(Prompt(text.format(i)) for i in range(n)) for g, text in groups.items()})


# ------------------------------------------------------------------------------------------------ given a model
def context_of_model(
    subject: Subject, prompts: PromptSet, held_out: PromptSet | None = None, **options: Any
) -> AnalysisContext:
    """Return a context with the mean differences of these prompts, which are also held out unless others are given."""
    acts = collect_activations(subject, prompts, **options)
    return AnalysisContext(acts, find_directions(acts, [Step(use="mean_diff")]), subject, prompts, held_out or prompts)


def refusing_context(**options: Any) -> AnalysisContext:
    """Return a context of the refuser, with the direction that it refuses by at every stream."""
    return _refusing_context(tuple(options.items()))


@cache
def _refusing_context(options: tuple[tuple[str, Any], ...]) -> AnalysisContext:
    subject = refuser(**dict(options))
    return with_direction(context_of_model(subject, asked()), torch.eye(subject.width)[REFUSAL])


def with_direction(context: AnalysisContext, vector: Tensor, stream: int | None = None) -> AnalysisContext:
    """Return the context with one direction at every stream; ``stream``, by default the last, has the best score."""
    streams = len(context.directions.score)
    basis = normalize(vector, dim=0).expand(streams, 1, -1).contiguous()
    score = torch.zeros(streams)
    score[-1 if stream is None else stream] = 1
    return replace(context, directions=Directions(basis, score, score, "known"))


def with_random_direction(context: AnalysisContext, seed: int = 5) -> AnalysisContext:
    """Return the context with a direction that has nothing of the axes that mean something in the refuser."""
    noise = torch.randn(context.subject.width, generator=torch.Generator().manual_seed(seed))
    return with_direction(context, torch.cat([torch.zeros(END + 1), noise[END + 1 :]]))


def with_same_groups(context: AnalysisContext) -> AnalysisContext:
    """Return the context with the control prompts as target prompts too."""
    control = context.prompts["control"]
    same = PromptSet({"target": control, "control": control})
    acts = replace(context.activations, groups=dict.fromkeys(("target", "control"), context.activations["control"]))
    return replace(context, activations=acts, prompts=same, held_out=same)


def token_ids(context: AnalysisContext, group: str) -> list[list[int]]:
    """Return the templated prompts of a group as token ids."""
    return render_prompts(context.subject, context.prompts[group])


# ---------------------------------------------------------------------------------------------------- findings
def check_finding(finding: Finding, labels: Sequence[str] = ()) -> dict[str, Any]:
    """Check the contract of every finding and return its numbers.

    JSON holds the numbers, the summary is one line, and the plot draws with a label at every axis. labels: axis labels
    that must be among those of the plot.
    """
    from matplotlib.figure import Figure

    numbers = json.loads(json.dumps(finding.to_dict(), allow_nan=False))
    assert isinstance(numbers, dict)
    assert finding.summary()
    assert "\n" not in finding.summary()
    figure = Figure(figsize=(7, 4), layout="constrained")
    finding.draw(figure)
    plots = [a for a in figure.axes if a.get_label() != "<colorbar>"]
    assert plots
    assert all(a.get_xlabel() for a in plots if a.get_subplotspec().is_last_row())  # maps above each other share one
    assert all(a.get_ylabel() for a in figure.axes)
    figure.savefig(io.BytesIO(), format="svg")
    found = {text for axes in figure.axes for text in (axes.get_xlabel(), axes.get_ylabel())}
    assert set(labels) <= found, found
    return numbers
