"""Steps that make activations robust before directions are taken from them."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from obliteratus.core.shapes import Float
from obliteratus.core.types import Activations, Directions, Moments
from obliteratus.distill.steps import extractors, kept_rows


@extractors.register("winsorise", cite="doi:10.1214/aoms/1177704711", needs=("rows",))
def winsorise(
    acts: Activations,
    so_far: Directions | None,
    *,
    share: Annotated[float, Field(gt=0, lt=0.5)] = 0.01,  # one prompt in a hundred at each end, as audited
) -> Activations:
    """Each activation held between its group's [share, 1 − share] quantiles, for the steps that follow.

    The quantiles are taken over a group's prompts, for each stream index and width dimension by itself (linear
    between prompts), so one prompt with a freak activation cannot turn a mean. All groups are treated; their
    means are taken anew. With few prompts it does little: at 0.01, under a hundred, only the extremes move.
    Heretic's `winsorization_quantile` is another thing: one bound for a prompt's whole vector. Needs rows.
    """
    groups = {g: _clamped(moments, kept_rows(acts, g, "winsorise"), share) for g, moments in acts.groups.items()}
    return replace(acts, groups=groups)


def _clamped(moments: Moments, rows: Float[Tensor, "prompts streams width"], share: float) -> Moments:
    made, mean = torch.empty_like(rows), torch.empty_like(rows[0])
    for stream in range(rows.shape[1]):  # one at a time: sorting needs a few copies of what it sorts
        one = rows[:, stream]
        ordered = one.sort(dim=0).values  # torch.quantile refuses more than 16 million numbers
        made[:, stream] = one.clamp(_quantile(ordered, share), _quantile(ordered, 1 - share))
        mean[stream] = made[:, stream].double().mean(0).float()
    return replace(moments, mean=mean, rows=made)


def _quantile(ordered: Float[Tensor, "prompts width"], share: float) -> Float[Tensor, " width"]:
    at = share * (len(ordered) - 1)
    low = int(at)
    return torch.lerp(ordered[low], ordered[min(low + 1, len(ordered) - 1)], at - low)
