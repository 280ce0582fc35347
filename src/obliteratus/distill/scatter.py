"""How prompts spread, Σ(x − μ)(x − μ)ᵀ, from rows that were kept or from a sketch of them: never width × width."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from obliteratus.core.shapes import Float
from obliteratus.core.types import Activations
from obliteratus.distill.steps import missing_rows_error, optional_group


@dataclass(frozen=True)
class Scatter:
    """RᵀR at one stream index."""

    rows: Float[Tensor, "rows width"]
    """R: each prompt about its group's mean, or fewer rows that stand for all of them."""
    total: float
    """The trace, with what a sketch left out."""
    prompts: int

    def __add__(self, other: Scatter) -> Scatter:
        """Both groups', each about its own mean."""
        rows = torch.cat([self.rows, other.rows])
        return Scatter(rows, self.total + other.total, self.prompts + other.prompts)

    def beside(self, row: Float[Tensor, " width"]) -> Scatter:
        """Another row: √n·(μ − c) turns the scatter of n prompts about μ into that about c."""
        return Scatter(torch.cat([self.rows, row[None]]), self.total + float(row.square().sum()), self.prompts)


def group_scatter(acts: Activations, group: str, stream: int, step: str) -> Scatter:
    """Of one group about its mean. Raises UserError where the recipe kept only means, or the group has no prompts."""
    moments = optional_group(acts, group, step)
    if moments.sketch is not None:
        rows, total = moments.sketch.rows[stream], moments.sketch.total[stream].item()
    elif moments.rows is not None:
        rows = moments.rows[:, stream] - moments.mean[stream]
        total = rows.double().square().sum().item()
    else:
        raise missing_rows_error(step, "spread")
    return Scatter(rows, total, moments.count)
