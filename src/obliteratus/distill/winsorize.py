"""Winsorizing: limit outliers in the activations before directions are computed from them."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from obliteratus.core.shapes import Float
from obliteratus.core.types import Activations, Directions, Moments
from obliteratus.distill.steps import extractors, require_rows


@extractors.register("winsorize", cite="doi:10.1214/aoms/1177704711", needs=("rows",))
def winsorize(
    acts: Activations,
    previous: Directions | None,
    *,
    share: Annotated[float, Field(gt=0, lt=0.5)] = 0.01,  # one prompt in a hundred at each end, as audited
) -> Activations:
    """Clamp each activation to its group's [share, 1 − share] quantiles, for the steps that follow.

    The quantiles are taken over a group's prompts, separately for each stream and width dimension (linear interpolation
    between prompts), so that one prompt with an outlying activation cannot turn a mean. All groups are clamped and
    their means recomputed. With few prompts it does little: at 0.01 and under a hundred prompts, only the extremes
    move. Heretic's `winsorization_quantile` is something else, one bound for a prompt's whole vector. Needs rows.
    """
    groups = {
        name: _clamp_group(moments, require_rows(acts, name, "winsorize"), share)
        for name, moments in acts.groups.items()
    }
    return replace(acts, groups=groups)


def _clamp_group(moments: Moments, rows: Float[Tensor, "prompts streams width"], share: float) -> Moments:
    clamped, mean = torch.empty_like(rows), torch.empty_like(rows[0])
    for stream in range(rows.shape[1]):  # one stream at a time, because sorting needs several copies of its input
        values = rows[:, stream]
        ordered = values.sort(dim=0).values  # torch.quantile refuses more than 16 million numbers
        clamped[:, stream] = values.clamp(_quantile(ordered, share), _quantile(ordered, 1 - share))
        mean[stream] = clamped[:, stream].double().mean(0).float()
    return replace(moments, mean=mean, rows=clamped)


def _quantile(ordered: Float[Tensor, "prompts width"], share: float) -> Float[Tensor, " width"]:
    position = share * (len(ordered) - 1)
    low = int(position)
    return torch.lerp(ordered[low], ordered[min(low + 1, len(ordered) - 1)], position - low)
