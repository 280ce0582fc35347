"""What every weigh step shares: the registry, the product of a recipe's steps, and values by layer.

Steps multiply, so their order does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from obliteratus.core.errors import NothingMatchedError
from obliteratus.core.registry import Registry
from obliteratus.core.settings import Step
from obliteratus.core.shapes import Float
from obliteratus.core.types import Activations, Directions, Site

Share = Annotated[float, Field(ge=0, le=1)]

Weigher = Callable[..., Tensor]
"""(directions, sites, activations, **options) → a factor ≥ 0 for each site."""


weighers: Registry[Weigher] = Registry("weigh")


def weigh_sites(
    directions: Directions, sites: Sequence[Site], acts: Activations, steps: Sequence[Step]
) -> Float[Tensor, " sites"]:
    """Product of all steps' factors. Raises NothingMatchedError where no site is left."""
    factors = torch.ones(len(sites))
    for step in steps:
        options = weighers.check(step.use, step.options)
        factors = factors * weighers[step.use].function(directions, sites, acts, **options)
    if not factors.any():
        raise NothingMatchedError(f"recipe: the weigh steps {[s.use for s in steps]} leave no layer; widen one of them")
    return factors


def per_layer(sites: Sequence[Site], values: Float[Tensor, " layers"]) -> Float[Tensor, " sites"]:
    """Each site's value, looked up by its layer; embeddings and the head, which are in no layer, get 1."""
    known = dict(enumerate(values.tolist()))
    return torch.tensor([known.get(site.layer, 1.0) for site in sites])


def layer_scores(directions: Directions) -> Float[Tensor, " layers"]:
    """Score of the stream that each block writes into."""
    return directions.score[1:]


def layer_depths(directions: Directions) -> Float[Tensor, " layers"]:
    """Each layer's place, l / (L − 1): 0 is the first block, 1 the last. A single layer lies at 0."""
    n = len(layer_scores(directions))
    return torch.arange(n, dtype=torch.float64) / max(1, n - 1)


def best_share(values: Float[Tensor, " layers"], share: float) -> Float[Tensor, " layers"]:
    """1 at the ``share`` of layers with the highest values (at least one; of equals the earlier), else 0."""
    kept = values.argsort(descending=True, stable=True)[: max(1, round(share * len(values)))]
    return torch.zeros_like(values).index_fill(0, kept, 1.0)
