"""How near the recovered directions are to the base's own: the difference of means of two groups of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from obliteratus.audit.tensor_trace import PROJECTION, TensorTrace
from obliteratus.audit.verdict import SharedDirection
from obliteratus.core.settings import Probe, Step
from obliteratus.core.shapes import Float
from obliteratus.core.types import PromptSet, Subject
from obliteratus.distill import find_directions
from obliteratus.probe.probe import collect_activations

DRAWS = 1000  # random directions for the chance level: its 95th percentile then varies by about 2 %
CHANCE = 0.95  # quantile of the cosines of random directions


@dataclass(frozen=True)
class DirectionCosines:
    """Absolute cosines with the difference of means, 0–1."""

    own: float
    """Median over the projections of how much of their stream's difference of means their subspace holds."""
    best: float
    """Of the shared direction, with the stream whose difference of means is nearest to it."""
    stream: int
    """That stream."""
    chance: float
    """95th percentile of `best` for random directions."""
    by_tensor: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return dict(vars(self))


def find_mean_differences(subject: Subject, prompts: PromptSet) -> Float[torch.Tensor, "streams width"]:
    """Return the unit difference of means of target and control prompts in every stream."""
    acts = collect_activations(subject, prompts, Probe(keep="moments"))
    return find_directions(acts, (Step(use="mean_diff"),)).basis[:, 0]


def compare_directions(
    traces: Sequence[TensorTrace], shared: SharedDirection, means: Float[torch.Tensor, "streams width"]
) -> DirectionCosines:
    """Return the cosines of the recovered directions with the differences of means."""
    by_tensor = {
        t.name: float((t.directions @ means[t.site.stream]).norm())
        for t in traces
        if t.kind == PROJECTION and t.directions is not None and t.site is not None
    }
    cosines = (means @ shared.direction).abs()
    noise = torch.randn(DRAWS, means.shape[1], generator=torch.Generator().manual_seed(0))
    drawn = (noise / noise.norm(dim=1, keepdim=True) @ means.mT).abs().amax(1)
    own = float(torch.tensor([*by_tensor.values()]).median())
    best = int(cosines.argmax())
    return DirectionCosines(own, float(cosines[best]), best, float(drawn.quantile(CHANCE)), by_tensor)
