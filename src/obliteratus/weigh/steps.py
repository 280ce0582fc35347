"""What all weigh steps share: their registry, the product of a recipe's steps, and values by layer.

The factors of steps are multiplied, so their order does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from obliteratus.core.errors import NothingMatchedError
from obliteratus.core.registry import Registry
from obliteratus.core.settings import Step, active_steps
from obliteratus.core.shapes import Float
from obliteratus.core.types import Activations, Directions, Site

Share = Annotated[float, Field(ge=0, le=1)]

Weigher = Callable[..., Tensor]
"""(directions, sites, activations, **options) → a factor ≥ 0 for each site."""


weighers: Registry[Weigher] = Registry("weigh")


NOTHING = Activations({}, -1)


def weigh_sites(
    directions: Directions,
    sites: Sequence[Site],
    acts: Activations | None = None,
    steps: Sequence[Step | str] = ("all",),
) -> Float[Tensor, " sites"]:
    """Return the product of the factors of all steps that are not left out, one for each site.

    acts: may be left out if no step reads them. steps: with their options, or by name alone. Raises NothingMatchedError
    if every site has factor 0.

    >>> ob.weigh_sites(directions, subject.sites, acts, ["knee"]).shape
    torch.Size([58])
    """
    factors, active, acts = torch.ones(len(sites)), active_steps(steps), acts or NOTHING
    for step in active:
        options = weighers.check(step.use, step.options)
        factors = factors * weighers[step.use].function(directions, sites, acts, **options)
    if not factors.any():
        raise NothingMatchedError(
            f"recipe: the weigh steps {[s.use for s in active]} leave no layer to edit; widen one of them"
        )
    return factors


def expand_to_sites(sites: Sequence[Site], values: Float[Tensor, " layers"]) -> Float[Tensor, " sites"]:
    """Return each site's value, looked up by its layer. Embeddings and the LM head, which are in no layer, get 1."""
    by_layer = dict(enumerate(values.tolist()))
    return torch.tensor([by_layer.get(site.layer, 1.0) for site in sites])


def layer_scores(directions: Directions) -> Float[Tensor, " layers"]:
    """Return the score of the stream that each block writes into."""
    return directions.score[1:]


def layer_depths(directions: Directions) -> Float[Tensor, " layers"]:
    """Return each layer's depth l / (L − 1): 0 for the first block, 1 for the last. A single layer has depth 0."""
    n = len(layer_scores(directions))
    return torch.arange(n, dtype=torch.float64) / max(1, n - 1)


def select_best(values: Float[Tensor, " layers"], share: float) -> Float[Tensor, " layers"]:
    """Return 1 at the ``share`` of layers with the highest values (at least one; ties go to the earlier), else 0."""
    selected = values.argsort(descending=True, stable=True)[: max(1, round(share * len(values)))]
    return torch.zeros_like(values).index_fill(0, selected, 1.0)
