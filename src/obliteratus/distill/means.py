"""Difference of means, and spreading one layer's directions over all."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from obliteratus.core.types import Activations, Directions
from obliteratus.distill.steps import (
    extractors,
    mean_difference,
    orthonormalize,
    previous_directions,
    with_common_score,
)


@extractors.register("mean_diff", cite="arXiv:2406.11717")
def mean_diff(acts: Activations, so_far: Directions | None) -> Directions:
    """The unit vector from the control mean to the target mean, at each stream index (k = 1).

    raw: ‖μ_target − μ_control‖, in the stream's own units, which grow with depth; compare layers by score.
    Needs moments only.
    """
    delta = mean_difference(acts)
    raw = delta.norm(dim=1)
    basis = (delta / raw.clamp(min=1e-30)[:, None])[:, None]
    return Directions(basis, with_common_score(acts, basis), raw, "‖Δμ‖")


@extractors.register("single", cite="arXiv:2406.11717")
def single(
    acts: Activations,
    so_far: Directions | None,
    *,
    depth: Annotated[float, Field(ge=0, le=1)] | None = None,
    leaving: bool = False,
) -> Directions:
    """One layer's directions for all layers, as Arditi et al. edit.

    depth: stream index as a share of L, 0–1; None takes the stream with the highest score.
    leaving: depth names a block instead, ⌊depth·L⌋ (the last at 1), and the stream that leaves it is taken.
    """
    so_far = previous_directions(so_far, "single")
    last = len(so_far.score) - 1
    at = int(so_far.score.argmax()) if depth is None else round(depth * last)
    if leaving and depth is not None:
        at = min(int(depth * last) + 1, last)
    basis = so_far.basis[at].expand_as(so_far.basis).contiguous()
    return Directions(basis, so_far.score, so_far.raw, so_far.unit, so_far.trace)


@extractors.register("orthogonal_to_control", cite="huggingface.co/blog/grimjim/projected-abliteration")
def orthogonal_to_control(acts: Activations, so_far: Directions | None) -> Directions:
    """Takes out of each direction its part along the control mean, so that removing it leaves that mean alone.

    Early layers have large means that all prompts share; a raw mean difference leans on them by chance, and
    removing it then costs far more than it should (docs/experiments/directions.md). Rows stay orthonormal; a
    row that was all control mean becomes a row of zeros.
    """
    so_far = previous_directions(so_far, "orthogonal_to_control")
    mean = torch.nn.functional.normalize(acts["control"].mean, dim=1)
    rest = so_far.basis - torch.einsum("lkw,lw->lk", so_far.basis, mean)[..., None] * mean[:, None]
    basis = orthonormalize(rest)
    return Directions(basis, with_common_score(acts, basis), so_far.raw, so_far.unit, so_far.trace)
