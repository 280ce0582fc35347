"""Difference of means, and steps that reuse one layer's directions or remove the control mean from directions."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from obliteratus.core.types import Activations, Directions
from obliteratus.distill.steps import compute_score, extractors, mean_difference, orthonormalize, require_directions


@extractors.register("mean_diff", cite="arXiv:2406.11717")
def mean_diff(acts: Activations, previous: Directions | None) -> Directions:
    """Find the unit vector from the control mean to the target mean at each stream (k = 1).

    raw: ‖μ_target − μ_control‖, in the stream's own units, which grow with depth; compare layers by score.
    Needs moments only.
    """
    delta = mean_difference(acts)
    raw = delta.norm(dim=1)
    basis = (delta / raw.clamp(min=1e-30)[:, None])[:, None]
    return Directions(basis, compute_score(acts, basis), raw, "‖Δμ‖")


@extractors.register("single", cite="arXiv:2406.11717")
def use_single_layer(
    acts: Activations,
    previous: Directions | None,
    *,
    depth: Annotated[float, Field(ge=0, le=1)] | None = None,
    leaving: bool = False,
) -> Directions:
    """Use one layer's directions at all layers, as Arditi et al. do.

    depth: stream index as a share of L, 0–1; None takes the stream with the highest score.
    leaving: depth names a block instead, ⌊depth·L⌋ (the last block at 1), and the stream that leaves it is taken.
    """
    previous = require_directions(previous, "single")
    last = len(previous.score) - 1
    stream = int(previous.score.argmax()) if depth is None else round(depth * last)
    if leaving and depth is not None:
        stream = min(int(depth * last) + 1, last)
    basis = previous.basis[stream].expand_as(previous.basis).contiguous()
    return Directions(basis, previous.score, previous.raw, previous.unit, previous.trace)


@extractors.register("orthogonal_to_control", cite="huggingface.co/blog/grimjim/projected-abliteration")
def orthogonal_to_control(acts: Activations, previous: Directions | None) -> Directions:
    """Remove each direction's component along the control mean, so that removing the direction leaves that mean alone.

    Early layers have large means that all prompts share. A raw mean difference has by chance a component along them,
    and removing it costs far more than it should (docs/experiments/directions.md). Rows stay orthonormal; a row
    that lay along the control mean becomes a row of zeros.
    """
    previous = require_directions(previous, "orthogonal_to_control")
    mean = torch.nn.functional.normalize(acts["control"].mean, dim=1)
    rest = previous.basis - torch.einsum("lkw,lw->lk", previous.basis, mean)[..., None] * mean[:, None]
    basis = orthonormalize(rest)
    return Directions(basis, compute_score(acts, basis), previous.raw, previous.unit, previous.trace)
