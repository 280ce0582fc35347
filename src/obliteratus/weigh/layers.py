"""Selections of layers (weight 1 or 0), and weights by the layer's own score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from obliteratus.core.errors import UserError
from obliteratus.core.types import Activations, Directions, Site
from obliteratus.weigh.steps import Share, expand_to_sites, layer_depths, layer_scores, select_best, weighers

# If no sorted score is farther from the chord than this share of the best score, there is no knee, only rounding.
MIN_KNEE_DISTANCE = 0.01


@weighers.register("all")
def every_layer(directions: Directions, sites: Sequence[Site], acts: Activations) -> Tensor:
    """Select every layer."""
    return torch.ones(len(sites))


@weighers.register("skip_first")
def skip_first(
    directions: Directions, sites: Sequence[Site], acts: Activations, *, n: Annotated[int, Field(ge=0)] = 1
) -> Tensor:
    """Select all layers but the first n."""
    layers = torch.arange(len(layer_scores(directions)))
    return expand_to_sites(sites, (layers >= n).float())


@weighers.register("middle")
def middle(
    directions: Directions, sites: Sequence[Site], acts: Activations, *, low: Share = 0.2, high: Share = 0.8
) -> Tensor:
    """Select the layers from ``low`` to ``high``, both included, as shares of the depth l / (L − 1)."""
    if low > high:
        raise UserError(f"weigh step 'middle': low={low} is above high={high}; swap them")
    depth = layer_depths(directions)
    return expand_to_sites(sites, ((depth >= low) & (depth <= high)).float())


@weighers.register("knee")
def knee(directions: Directions, sites: Sequence[Site], acts: Activations, *, floor: Share = 0.05) -> Tensor:
    """Select the layers up to the knee of the scores sorted from high to low, found by the chord rule.

    The knee is the score with the greatest vertical distance from the straight line between the first and the last
    score. floor: layers below this share of the best score are never selected; if there is no knee, all others are. One
    or two layers are always selected.
    """
    score = layer_scores(directions)
    if len(score) <= 2:
        return torch.ones(len(sites))
    order = score.argsort(descending=True)
    y = score[order] / score.max().clamp(min=1e-30)
    x = torch.linspace(0, 1, len(y))
    distance = (y[0] + (y[-1] - y[0]) * x - y).abs()
    if distance.max() < MIN_KNEE_DISTANCE:
        return expand_to_sites(sites, (score >= floor * score.max()).float())
    selected = order[: int(distance.argmax()) + 1]
    mask = torch.zeros_like(score).index_fill(0, selected, 1.0)
    return expand_to_sites(sites, mask * (score >= floor * score.max()))


@weighers.register("cosmic_layers", cite="arXiv:2506.00085")
def cosmic_layers(directions: Directions, sites: Sequence[Site], acts: Activations, *, share: Share = 0.1) -> Tensor:
    """Select the ``share`` of layers (at least one) whose target and control means have the lowest cosine similarity.

    This is only COSMIC's choice of layers. COSMIC runs the model with each candidate direction and compares candidates
    at these layers; that comparison is the distill step of its name. The means are those of the stream after each
    block, not centered, so what all prompts share counts in both. The directions are not used.
    """
    target, control = (acts[group].mean[1:].double() for group in ("target", "control"))
    return expand_to_sites(sites, select_best(-torch.cosine_similarity(target, control, dim=1), share))


@weighers.register("knee_cosmic", cite="arXiv:2506.00085")
def knee_cosmic(
    directions: Directions, sites: Sequence[Site], acts: Activations, *, floor: Share = 0.05, share: Share = 0.1
) -> Tensor:
    """Select the layers that ``knee`` (with this floor) or ``cosmic_layers`` (with this share) selects."""
    return torch.maximum(
        knee(directions, sites, acts, floor=floor), cosmic_layers(directions, sites, acts, share=share)
    )


@weighers.register("top")
def top(
    directions: Directions, sites: Sequence[Site], acts: Activations, *, share: Share = 1.0, floor: Share = 0.05
) -> Tensor:
    """Select the best ``share`` of all layers (at least one), leaving out those below ``floor`` of the best score."""
    score = layer_scores(directions)
    return expand_to_sites(sites, select_best(score, share) * (score >= floor * score.max()))


@weighers.register("by_score")
def by_score(directions: Directions, sites: Sequence[Site], acts: Activations) -> Tensor:
    """Weigh each layer by √(score / best score)."""
    score = layer_scores(directions)
    return expand_to_sites(sites, (score / score.max().clamp(min=1e-30)).sqrt())
