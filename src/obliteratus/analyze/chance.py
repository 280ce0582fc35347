"""Directions that chance alone gives: differences of means of the prompts at hand where labels mean nothing.

They are what a fitted direction has to be compared with. Streams vary along few directions, and what two sets of
prompts differ by, whatever their labels, lies along these. Directions drawn evenly from the sphere do not, so a
difference of means stands out among them: for a footprint in random models, in 57 % of draws whose labels mean nothing
(docs/experiments/null-rates.md).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from obliteratus.analyze.samples import Sample
from obliteratus.core.shapes import Float, Int


def draw_chance_directions(sample: Sample, stream: int, draws: int, seed: int) -> Float[Tensor, "draws width"]:
    """Return unit differences of means at one stream under random permutations of the labels; fp32.

    Where labels mean nothing, the fitted difference of means is one more such draw, for any distribution of the rows.
    The same seed gives the same labels at every stream. Where the rows do not vary, the directions are drawn evenly
    from the sphere.

    A true difference is in part of the draws too, which makes it harder to tell from them. To take each row less its
    own group's mean would avoid that, but holds its level for Gaussian rows only: a footprint was found in 19 of 200
    draws without any difference, instead of 12 (docs/experiments/null-rates.md).
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(draws, len(sample), generator=generator).argsort(1)
    noise = torch.randn(draws, sample.target.shape[2], generator=generator)
    rows = sample.at(stream)
    if not rows.any():
        return normalize(noise, dim=1)
    found = normalize(_draw_weights(order, sample.n) @ rows, dim=1)
    return found.float()


def draw_chance_subspaces(sample: Sample, stream: int, k: int, draws: int, seed: int) -> Float[Tensor, "draws k width"]:
    """Return orthonormal rows that each span k of `draw_chance_directions`."""
    vectors = draw_chance_directions(sample, stream, draws * k, seed).view(draws, k, -1)
    q: Tensor = torch.linalg.qr(vectors.mT)[0]
    return q.mT.contiguous()


def _draw_weights(order: Int[Tensor, "draws rows"], n: int) -> Float[Tensor, "draws rows"]:
    """Return the weights of a difference of means of the rows at places i < n minus that of the others."""
    rows = order.shape[1]
    side = torch.where(torch.arange(rows) < n, 1 / n, -1 / (rows - n)).double()
    return torch.zeros(order.shape).double().scatter_(1, order, side.expand(order.shape))
