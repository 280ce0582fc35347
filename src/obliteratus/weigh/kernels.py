"""Weights that vary over the depth, between attention and MLP, or with the smooth part of the layers' scores."""

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
from obliteratus.weigh.steps import Share, expand_to_sites, layer_depths, layer_scores, weighers

Weight = Annotated[float, Field(ge=0, le=4)]  # the range of excise.strength, which it multiplies
Distance = Annotated[float, Field(gt=0)]
Part = Literal["", "attn.out", "mlp.out"]

# Tolerance for comparing distances: l / (L − 1) and a decimal peak differ in the last bits of fp64.
DISTANCE_TOLERANCE = 1e-9


def _weigh_part(part: Part, sites: Sequence[Site], values: Float[Tensor, " layers"]) -> Float[Tensor, " sites"]:
    """Return each layer's value at the sites of one part (empty: all parts), and 1 elsewhere."""
    chosen = torch.tensor([not part or site.part in expand_part(part) for site in sites])
    return torch.where(chosen, expand_to_sites(sites, values), torch.ones(len(sites)))


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
    """Weigh layers by Heretic's kernel: ``max_weight`` at the peak, a linear fall up to distance ``reach``, 0 beyond.

    peak, reach: shares of the depth l / (L − 1); a layer at exactly ``reach`` still has the lowest weight.
    min_weight: the lowest weight, as a share of ``max_weight``. part: the part to weigh, empty for all; Heretic has one
    kernel for attention and one for the MLP, which are two steps here.
    """
    distance = (layer_depths(directions) - peak).abs()
    slope = max_weight * (1 - (1 - min_weight) * (distance / reach).clamp(max=1))
    return _weigh_part(part, sites, slope * (distance <= reach + DISTANCE_TOLERANCE))


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
    """Weigh layers by a Gaussian: max_weight · (floor + (1 − floor) · exp(−½((l/(L−1) − peak) / width)²)).

    peak, width (one standard deviation): shares of the depth. floor: the weight far away from the peak, as a share of
    ``max_weight``. part: the part to weigh; empty for all.
    """
    height = torch.exp(-0.5 * ((layer_depths(directions) - peak) / width).square())
    return _weigh_part(part, sites, max_weight * (floor + (1 - floor) * height))


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
    """Weigh layers by Gabliteration's scale with its ridge: base · (1 + beta · (1 − |ξ|)) / (1 + ridge).

    ξ runs evenly from −1 to 1 over the edited layers. The published edit is W − α_l P W with the damped projector
    P = Rᵀ(RRᵀ + λI)⁻¹R; R has orthonormal rows, so P = RᵀR / (1 + λ) and the ridge is a factor. skip_first, skip_last:
    the number of layers at both ends that get weight 0. The defaults are the paper's.
    """
    layers = len(layer_scores(directions))
    edited = max(0, layers - skip_first - skip_last)
    xi = torch.linspace(-1, 1, edited, dtype=torch.float64)
    values = torch.zeros(layers, dtype=torch.float64)
    values[skip_first : skip_first + edited] = base * (1 + beta * (1 - xi.abs())) / (1 + ridge)
    return expand_to_sites(sites, values)


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
    """Weigh attention, MLP and embedding writers by separate factors; all other sites keep 1."""
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
    """Weigh each layer by the share of its score that is smooth over the depth; layer-to-layer noise counts less.

    x_l is the layer's score, and y is a sum of the lowest orthonormal DCT-II components of x over the layers.
    Components are added one at a time, starting with the mean (k = 0), until ‖x − y‖² is at most ``threshold`` times
    ‖x − mean(x)‖², or there are ``bands`` of them. With y⁺ = max(y, 0) the weight is

        w_l = y⁺_l / (y⁺_l + |x_l − y_l|)   in 0–1,

    which is 1 where the score is entirely smooth, y/x at a spike, and less than 1 in a dent too. A constant profile
    gives ones, as does one with at most ``bands`` layers and threshold 0. The default of 4 bands (the mean and three
    half waves) can follow a profile with one hump.
    """
    score = layer_scores(directions).double()
    smooth = smooth_profile(score, bands, threshold)
    rest, smooth = (score - smooth).abs(), smooth.clamp(min=0)
    exact = rest <= DISTANCE_TOLERANCE * score.max()  # covers 0 / 0 and rounding
    return expand_to_sites(sites, torch.where(exact, 1.0, smooth / (smooth + rest).clamp(min=1e-300)))


def smooth_profile(profile: Float[Tensor, " n"], bands: int, threshold: float) -> Float[Tensor, " n"]:
    """Return the sum of the lowest DCT-II components of the profile, with the stopping rule of `low_frequency`."""
    variation = (profile - profile.mean()).square().sum()
    smooth = torch.zeros_like(profile)
    for wave in make_dct_rows(len(profile))[:bands]:
        smooth = smooth + (wave @ profile) * wave
        if (profile - smooth).square().sum() <= threshold * variation:
            break
    return smooth


def make_dct_rows(n: int) -> Float[Tensor, "n n"]:
    """Return the orthonormal DCT-II matrix in fp64: row k is √(2/n)·cos(πk(l + ½)/n) over l, row 0 is √(1/n)."""
    k, position = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64) + 0.5
    rows = math.sqrt(2 / n) * torch.cos(math.pi * k * position / n)
    rows[0] = math.sqrt(1 / n)
    return rows
