"""How hard: weights that vary over the depth, between attention and MLP, or with the score's smooth part."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from obliteratus.core.settings import expand_part
from obliteratus.core.shapes import Float
from obliteratus.core.types import Activations, Directions, Site
from obliteratus.weigh.steps import Share, layer_depths, layer_scores, per_layer, weighers

Weight = Annotated[float, Field(ge=0, le=4)]  # the range of excise.strength, which it multiplies
Distance = Annotated[float, Field(gt=0)]
Part = Literal["", "attn.out", "mlp.out"]

# A distance equal to ``reach`` counts as within: l / (L − 1) and a decimal peak differ in the last bits of fp64.
ROUNDING = 1e-9


def _only(part: Part, sites: Sequence[Site], values: Float[Tensor, " layers"]) -> Float[Tensor, " sites"]:
    """Values by layer at the sites of one part (empty: of all), 1 elsewhere."""
    chosen = torch.tensor([not part or site.part in expand_part(part) for site in sites])
    return torch.where(chosen, per_layer(sites, values), torch.ones(len(sites)))


@weighers.register("tent", cite="github.com/p-e-w/heretic")
def tent(
    directions: Directions,
    sites: Sequence[Site],
    acts: Activations,
    *,
    max_weight: Weight = 1.0,
    peak: Share = 0.7,
    min_weight: Share = 0.0,
    reach: Distance = 0.5,
    part: Part = "",
) -> Tensor:
    """Heretic's kernel: ``max_weight`` at the peak, falling in a line to its least at distance ``reach``, 0 beyond.

    peak, reach: shares of the depth l / (L − 1); a layer at exactly ``reach`` still has the least weight.
    min_weight: the least, as a share of ``max_weight``. part: the sites it is for (Heretic has one kernel for
    attention and one for the MLP: give two steps); empty is all.
    """
    distance = (layer_depths(directions) - peak).abs()
    slope = max_weight * (1 - (1 - min_weight) * (distance / reach).clamp(max=1))
    return _only(part, sites, slope * (distance <= reach + ROUNDING))


@weighers.register("bell")
def bell(
    directions: Directions,
    sites: Sequence[Site],
    acts: Activations,
    *,
    max_weight: Weight = 1.0,
    peak: Share = 0.7,
    width: Distance = 0.2,
    floor: Share = 0.0,
    part: Part = "",
) -> Tensor:
    """A Gaussian over the depth: max_weight · (floor + (1 − floor) · exp(−½((l/(L−1) − peak) / width)²)).

    peak, width (one standard deviation): shares of the depth. floor: what is left far away, as a share of
    ``max_weight``. part: the sites it is for; empty is all.
    """
    height = torch.exp(-0.5 * ((layer_depths(directions) - peak) / width).square())
    return _only(part, sites, max_weight * (floor + (1 - floor) * height))


@weighers.register("adaptive_scale", cite="arXiv:2512.18901")
def adaptive_scale(
    directions: Directions,
    sites: Sequence[Site],
    acts: Activations,
    *,
    base: Weight = 0.3,
    beta: Annotated[float, Field(ge=0, le=4)] = 0.5,
    ridge: Annotated[float, Field(ge=0)] = 0.1,
    skip_first: Annotated[int, Field(ge=0)] = 2,
    skip_last: Annotated[int, Field(ge=0)] = 1,
) -> Tensor:
    """Gabliteration's scale with its ridge: base · (1 + beta · (1 − |ξ|)) / (1 + ridge), 0 in the layers left out.

    ξ runs evenly from −1 to 1 over the layers that are edited. The published edit is W − α_l P W with the damped
    projector P = Rᵀ(RRᵀ + λI)⁻¹R; R has orthonormal rows, so that P = RᵀR / (1 + λ) and the ridge is a factor.
    skip_first, skip_last: layers left out at both ends. Defaults are the paper's.
    """
    layers = len(layer_scores(directions))
    edited = max(0, layers - skip_first - skip_last)
    xi = torch.linspace(-1, 1, edited, dtype=torch.float64)
    values = torch.zeros(layers, dtype=torch.float64)
    values[skip_first : skip_first + edited] = base * (1 + beta * (1 - xi.abs())) / (1 + ridge)
    return per_layer(sites, values)


@weighers.register("component")
def component(
    directions: Directions,
    sites: Sequence[Site],
    acts: Activations,
    *,
    attn: Weight = 1.0,
    mlp: Weight = 1.0,
    embed: Weight = 1.0,
) -> Tensor:
    """Separate factors for what attention, the MLP and the embeddings write; all else keeps 1."""
    factor = {"attn.out": attn, "embed": embed, **dict.fromkeys(expand_part("mlp.out"), mlp)}
    return torch.tensor([factor.get(site.part, 1.0) for site in sites])


@weighers.register("low_frequency")
def low_frequency(
    directions: Directions,
    sites: Sequence[Site],
    acts: Activations,
    *,
    bands: Annotated[int, Field(ge=1)] = 4,
    threshold: Share = 0.05,
) -> Tensor:
    """How much of each layer's score is smooth over the depth: noise from layer to layer is weighed down.

    x_l is the layer's score, and y the sum of x's lowest orthonormal DCT-II components over the layers. One is
    added at a time, from the mean (k = 0) on; after each ‖x − y‖² is measured anew, and y is done when that is at
    most ``threshold`` of ‖x − mean(x)‖², or after ``bands`` components. With y⁺ = max(y, 0) the weight is

        w_l = y⁺_l / (y⁺_l + |x_l − y_l|)   in 0–1,

    which is 1 where the score is all smooth, y/x at a spike, and less than 1 in a dent as well. A constant profile,
    or one of no more layers than ``bands`` with threshold 0, gives ones. The default of 4 (the mean and three half
    waves) follows a profile with one hump.
    """
    score = layer_scores(directions).double()
    smooth = smoothed(score, bands, threshold)
    rest, smooth = (score - smooth).abs(), smooth.clamp(min=0)
    exact = rest <= ROUNDING * score.max()  # 0 / 0 and rounding included
    return per_layer(sites, torch.where(exact, 1.0, smooth / (smooth + rest).clamp(min=1e-300)))


def smoothed(profile: Float[Tensor, " n"], bands: int, threshold: float) -> Float[Tensor, " n"]:
    """The sum of the lowest components of the profile, as `low_frequency` says when to stop."""
    varies = (profile - profile.mean()).square().sum()
    smooth = torch.zeros_like(profile)
    for wave in dct_rows(len(profile))[:bands]:
        smooth = smooth + (wave @ profile) * wave
        if (profile - smooth).square().sum() <= threshold * varies:
            break
    return smooth


def dct_rows(n: int) -> Float[Tensor, "n n"]:
    """The orthonormal DCT-II: row k is √(2/n)·cos(πk(l + ½)/n) over l, row 0 is √(1/n). fp64."""
    k, at = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64) + 0.5
    rows = math.sqrt(2 / n) * torch.cos(math.pi * k * at / n)
    rows[0] = math.sqrt(1 / n)
    return rows
