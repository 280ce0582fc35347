"""Which layers: selections that keep a layer in full or leave it out, and weights by the layer's own score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from obliteratus.core.errors import UserError
from obliteratus.core.types import Activations, Directions, Site
from obliteratus.weigh.steps import Share, best_share, layer_depths, layer_scores, per_layer, weighers

# Sorted scores nearer to their chord than this share of the best score have no knee, only rounding.
STRAIGHT = 0.01


@weighers.register("all")
def every_layer(directions: Directions, sites: Sequence[Site], acts: Activations) -> Tensor:
    """Every layer, at full weight."""
    return torch.ones(len(sites))


@weighers.register("skip_first")
def skip_first(
    directions: Directions, sites: Sequence[Site], acts: Activations, *, n: Annotated[int, Field(ge=0)] = 1
) -> Tensor:
    """All layers but the first n."""
    layers = torch.arange(len(layer_scores(directions)))
    return per_layer(sites, (layers >= n).float())


@weighers.register("middle")
def middle(
    directions: Directions, sites: Sequence[Site], acts: Activations, *, low: Share = 0.2, high: Share = 0.8
) -> Tensor:
    """Layers from ``low`` to ``high`` of the depth (0–1, both included), l / (L − 1)."""
    if low > high:
        raise UserError(f"weigh step 'middle': low={low} lies above high={high}; swap them")
    depth = layer_depths(directions)
    return per_layer(sites, ((depth >= low) & (depth <= high)).float())


@weighers.register("knee")
def knee(directions: Directions, sites: Sequence[Site], acts: Activations, *, floor: Share = 0.05) -> Tensor:
    """Layers up to the knee of the sorted scores: the point farthest from the chord from first to last.

    floor: layers below this share of the best score are never kept. Two layers or fewer, or no knee: all others.
    """
    score = layer_scores(directions)
    if len(score) <= 2:
        return torch.ones(len(sites))
    order = score.argsort(descending=True)
    y = score[order] / score.max().clamp(min=1e-30)
    x = torch.linspace(0, 1, len(y))
    distance = (y[0] + (y[-1] - y[0]) * x - y).abs()
    if distance.max() < STRAIGHT:
        return per_layer(sites, (score >= floor * score.max()).float())
    kept = order[: int(distance.argmax()) + 1]
    mask = torch.zeros_like(score).index_fill(0, kept, 1.0)
    return per_layer(sites, mask * (score >= floor * score.max()))


@weighers.register("cosmic_layers", cite="arXiv:2506.00085")
def cosmic_layers(directions: Directions, sites: Sequence[Site], acts: Activations, *, share: Share = 0.1) -> Tensor:
    """The ``share`` of layers (at least one) whose target and control means have the lowest cosine.

    Only COSMIC's choice of layers: there the model is run with each candidate direction, and these are the layers
    at which candidates are compared. That scoring is not done here. Means are of the stream each block leaves, and
    not centred, so what all prompts share counts in both. Reads the activations' means, not the directions.
    """
    target, control = (acts[group].mean[1:].double() for group in ("target", "control"))
    return per_layer(sites, best_share(-torch.cosine_similarity(target, control, dim=1), share))


@weighers.register("knee_cosmic", cite="arXiv:2506.00085")
def knee_cosmic(
    directions: Directions, sites: Sequence[Site], acts: Activations, *, floor: Share = 0.05, share: Share = 0.1
) -> Tensor:
    """Layers that ``knee`` (with this floor) or ``cosmic_layers`` (with this share) keeps."""
    return torch.maximum(
        knee(directions, sites, acts, floor=floor), cosmic_layers(directions, sites, acts, share=share)
    )


@weighers.register("top")
def top(
    directions: Directions, sites: Sequence[Site], acts: Activations, *, share: Share = 1.0, floor: Share = 0.05
) -> Tensor:
    """The best ``share`` of all layers (at least one) among those with ≥ ``floor`` of the best score."""
    score = layer_scores(directions)
    return per_layer(sites, best_share(score, share) * (score >= floor * score.max()))


@weighers.register("by_score")
def by_score(directions: Directions, sites: Sequence[Site], acts: Activations) -> Tensor:
    """√(score / best score): strong layers in full, weak ones less."""
    score = layer_scores(directions)
    return per_layer(sites, (score / score.max().clamp(min=1e-30)).sqrt())
