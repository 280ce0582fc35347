"""Where and how hard: one factor for each site. Steps multiply, so their order does not matter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from obliteratus.errors import UserError
from obliteratus.registry import Registry
from obliteratus.shapes import Float
from obliteratus.types import Directions, Site, Step

Share = Annotated[float, Field(ge=0, le=1)]
# Sorted scores nearer to their chord than this share of the best score have no knee, only rounding.
STRAIGHT = 0.01


Weigher = Callable[..., Tensor]
"""(directions, sites, **options) → a factor ≥ 0 for each site."""


weighers: Registry[Weigher] = Registry("weigh")


def weigh(directions: Directions, sites: Sequence[Site], steps: Sequence[Step]) -> Float[Tensor, " sites"]:
    """Product of all steps' factors. Raises UserError where no site is left."""
    factors = torch.ones(len(sites))
    for step in steps:
        factors = factors * weighers[step.use].function(directions, sites, **weighers.check(step.use, step.options))
    if not factors.any():
        raise UserError(f"recipe: the weigh steps {[s.use for s in steps]} leave no layer; widen one of them")
    return factors


def per_layer(sites: Sequence[Site], values: Float[Tensor, " layers"]) -> Float[Tensor, " sites"]:
    """Each site's value, looked up by its layer; embeddings and the head, which are in no layer, get 1."""
    known = dict(enumerate(values.tolist()))
    return torch.tensor([known.get(site.layer, 1.0) for site in sites])


def layer_scores(directions: Directions) -> Float[Tensor, " layers"]:
    """Score of the stream that each block writes into."""
    return directions.score[1:]


@weighers.register("all")
def everything(directions: Directions, sites: Sequence[Site]) -> Tensor:
    """Every layer, at full weight."""
    return torch.ones(len(sites))


@weighers.register("skip_first")
def skip_first(directions: Directions, sites: Sequence[Site], *, n: Annotated[int, Field(ge=0)] = 1) -> Tensor:
    """All layers but the first n."""
    layers = torch.arange(len(directions.score) - 1)
    return per_layer(sites, (layers >= n).float())


@weighers.register("middle")
def middle(directions: Directions, sites: Sequence[Site], *, low: Share = 0.2, high: Share = 0.8) -> Tensor:
    """Layers from ``low`` to ``high`` of the depth (0–1, both included), l / (L − 1)."""
    if low > high:
        raise UserError(f"weigh step 'middle': low={low} lies above high={high}; swap them")
    n = len(directions.score) - 1
    depth = torch.arange(n) / max(1, n - 1)
    return per_layer(sites, ((depth >= low) & (depth <= high)).float())


@weighers.register("knee")
def knee(directions: Directions, sites: Sequence[Site], *, floor: Share = 0.05) -> Tensor:
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
    mask = torch.zeros_like(score)
    mask[kept] = 1.0
    return per_layer(sites, mask * (score >= floor * score.max()))


@weighers.register("top")
def top(directions: Directions, sites: Sequence[Site], *, share: Share = 1.0, floor: Share = 0.05) -> Tensor:
    """The best ``share`` of all layers (at least one) among those with ≥ ``floor`` of the best score."""
    score = layer_scores(directions)
    kept = score.argsort(descending=True)[: max(1, round(share * len(score)))]
    mask = torch.zeros_like(score)
    mask[kept] = 1.0
    return per_layer(sites, mask * (score >= floor * score.max()))


@weighers.register("by_score")
def by_score(directions: Directions, sites: Sequence[Site]) -> Tensor:
    """√(score / best score): strong layers in full, weak ones less."""
    score = layer_scores(directions)
    return per_layer(sites, (score / score.max().clamp(min=1e-30)).sqrt())
