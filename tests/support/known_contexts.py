"""Grounds for tests of analyses: a model with a known truth, or a random one, and its null twins."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from matplotlib.figure import Figure
from tests.support.refuser import END, REFUSAL, asked, refuser
from torch import Tensor
from torch.nn.functional import normalize

from obliteratus.analyze import AnalysisContext, Finding
from obliteratus.causal import FitContext
from obliteratus.core.settings import Step
from obliteratus.core.types import Directions, PromptSet, Subject
from obliteratus.distill import find_directions
from obliteratus.inference.chat_template import render_prompts
from obliteratus.probe.probe import collect_activations


def ground_of(subject: Subject, prompts: PromptSet, held: PromptSet | None = None, **options: Any) -> AnalysisContext:
    """Mean differences of these prompts; they are held too unless others are given."""
    acts = collect_activations(subject, prompts, **options)
    return AnalysisContext(
        acts, find_directions(acts, [Step(use="mean_diff")]), FitContext(subject, prompts), held or prompts
    )


def planted_ground(**options: Any) -> AnalysisContext:
    """The refuser, with the direction that it refuses by at every stream."""
    subject = refuser(**options)
    return along(ground_of(subject, asked()), torch.eye(subject.width)[REFUSAL])


def along(ground: AnalysisContext, vector: Tensor, stream: int | None = None) -> AnalysisContext:
    """The same ground, with one direction at every stream; the best is ``stream``, the last if none is given."""
    streams = len(ground.directions.score)
    basis = normalize(vector, dim=0).expand(streams, 1, -1).contiguous()
    score = torch.zeros(streams)
    score[-1 if stream is None else stream] = 1
    return replace(ground, directions=Directions(basis, score, score, "known"))


def random_along(ground: AnalysisContext, seed: int = 5) -> AnalysisContext:
    """A direction that means nothing: in the refuser, it has nothing of the axes that have a meaning there."""
    width = ground.lab.subject.width
    noise = torch.randn(width, generator=torch.Generator().manual_seed(seed))
    return along(ground, torch.cat([torch.zeros(END + 1), noise[END + 1 :]]))


def same_groups(ground: AnalysisContext) -> AnalysisContext:
    """Target prompts that are the control prompts."""
    prompts = ground.lab.prompts
    same = PromptSet({"target": prompts["control"], "control": prompts["control"]})
    acts = replace(ground.acts, groups={g: ground.acts["control"] for g in ("target", "control")})
    return replace(ground, acts=acts, lab=FitContext(ground.lab.subject, same), held=same)


def ids_of(ground: AnalysisContext, group: str) -> list[list[int]]:
    return render_prompts(ground.lab.subject, ground.lab.prompts[group])


def drawn(finding: Finding, labels: Sequence[str]) -> None:
    """The finding can be told, held by JSON, and drawn; every axis of the plot has a label."""
    assert finding.told()
    assert "\n" not in finding.told()
    json.dumps(finding.numbers(), allow_nan=False)
    figure = Figure()
    finding.draw(figure)
    figure.canvas.draw()
    found = {text for axes in figure.axes for text in (axes.get_xlabel(), axes.get_ylabel())}
    assert set(labels) <= found, found
    assert all(axes.get_ylabel() for axes in figure.axes)
