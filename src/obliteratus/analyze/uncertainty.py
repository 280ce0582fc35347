"""How well the prompts at hand fix the difference of means: by resampling them, and by halving them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from obliteratus.analyze.base import AnalysisContext, analyses
from obliteratus.analyze.samples import (
    LEVEL,
    Level,
    Sample,
    chance_interval,
    draw_permutations,
    familywise_p_values,
    read_sample,
)
from obliteratus.core.shapes import Float, Int
from obliteratus.report.curves import BLUE, GREY, ORANGE, Figure, add_legend, plot_curve, plot_range

SPLITS = 5  # halvings whose cosines are averaged: a single one's outcome hangs on who fell into which half
PERMUTATIONS = 199  # × SPLITS halvings: p = 0.005 at best
CHUNK = 64  # permutations at a time: with 600 prompts and 5 halvings, 3 MB
RESAMPLES = 500  # the 95 % quantile then rests on 25 of them


@dataclass(frozen=True)
class Uncertainty:
    """Of the mean difference at each stream index."""

    angle: Float[Tensor, " streams"]
    """Median angle between it and that of resampled prompts, in degrees."""
    angle_high: Float[Tensor, " streams"]
    """95 % of resamples lie nearer."""
    halves: Float[Tensor, " streams"]
    """Cosine between the mean differences of two halves of the prompts, averaged over halvings."""
    chance: Float[Tensor, "ends streams"]
    """2.5 % and 97.5 % quantiles of the same under permuted labels."""
    p: Float[Tensor, " streams"]
    """Of ``halves``, corrected for all streams."""
    level: float
    n: tuple[int, int]

    @property
    def significant(self) -> tuple[int, ...]:
        """Stream indices whose halves agree beyond chance."""
        return tuple((self.p <= self.level).nonzero().flatten().tolist())

    def to_dict(self) -> dict[str, Any]:
        """By stream index: angles in degrees, cosines with what chance makes of them."""
        return {
            "prompts": {"target": self.n[0], "control": self.n[1]},
            "level": self.level,
            "found": list(self.significant),
            "angle": self.angle.tolist(),
            "angle_95": self.angle_high.tolist(),
            "halves": self.halves.tolist(),
            "halves_by_chance_low": self.chance[0].tolist(),
            "halves_by_chance_high": self.chance[1].tolist(),
            "p": self.p.tolist(),
        }

    def summary(self) -> str:
        n = f"{self.n[0]} and {self.n[1]} prompts"
        if not self.significant:
            return f"no direction that two halves of the prompts agree on beyond chance ({n})"
        best = min(self.significant, key=lambda s: float(self.angle[s]))
        return (
            f"{len(self.significant)} of {len(self.p)} streams have a direction that halves agree on; the surest is at "
            f"{best}: ±{float(self.angle_high[best]):.0f}° (95 %), halves' cosine {float(self.halves[best]):.2f} ({n})"
        )

    def draw(self, figure: Figure) -> None:
        """Angles beside cosines."""
        left, right = figure.subplots(1, 2)
        plot_curve(left, self.angle, "median", BLUE)
        plot_curve(left, self.angle_high, "95 % lie below", ORANGE)
        left.set(xlabel="stream index", ylabel="angle to resampled, degrees", ylim=(0, None))
        plot_curve(right, self.halves, "measured")
        plot_range(right, self.chance[0], self.chance[1], "labels permuted, 95 %")
        right.set(xlabel="stream index", ylabel="cosine of two halves", ylim=(-1.05, 1.05))
        right.axhline(0, color=GREY, lw=0.5)
        for axes in (left, right):
            add_legend(axes)


@analyses.register("uncertainty", cite="doi:10.1214/aos/1176344552", needs=("rows",))
def measure_uncertainty(
    context: AnalysisContext,
    *,
    resamples: Annotated[int, Field(ge=20, le=100_000)] = RESAMPLES,
    splits: Annotated[int, Field(ge=1, le=1000)] = SPLITS,
    draws: Annotated[int, Field(ge=19, le=100_000)] = PERMUTATIONS,
    level: Level = LEVEL,
    seed: int = 0,
) -> Uncertainty:
    """How far another sample of prompts would turn the mean difference, and whether two halves of these agree on it.

    Angles are the bootstrap's (Efron 1979): prompts drawn with replacement within each group, degrees to the mean
    difference of all, 90 where there is none. They say how much is noise once there is a direction; near 90° they
    flatter, since a resample shares prompts with the whole. The halves share none: their cosine is near 0 where there
    is nothing, and p compares it with ``draws`` permutations of the labels. Needs rows, four prompts of each group.
    """
    sample = read_sample(context.activations, "uncertainty", least=4)
    order = draw_permutations(len(sample), draws, seed)
    parts = draw_half_weights(sample, splits, seed + 1)
    weights = draw_bootstrap_weights(sample, resamples, seed + 2)
    turned, agreed = [], []
    for gram in sample.grams():
        turned.append(compute_angles(gram, weights))
        agreed.append(compute_half_agreement(gram, parts, order))
    found, spread = torch.stack(agreed, 1), torch.stack(turned, 1)
    high = torch.quantile(spread, 0.95, dim=0)
    p = familywise_p_values(found)
    return Uncertainty(
        spread.median(0).values, high, found[0], chance_interval(found), p, level, (sample.n, len(sample) - sample.n)
    )


def draw_half_weights(sample: Sample, splits: int, seed: int) -> Float[Tensor, "splits 2 rows"]:
    """Weights of the mean differences of two halves, each with half of either group (the middle prompt in one)."""
    generator = torch.Generator().manual_seed(seed)
    n, m = sample.n, len(sample) - sample.n
    sides = [(torch.rand(splits, size, generator=generator).argsort(1) < size // 2).double() for size in (n, m)]
    made = [torch.stack([_shares(s), _shares(1 - s)], 1) for s in sides]
    return torch.cat([made[0], -made[1]], 2)


def draw_bootstrap_weights(sample: Sample, resamples: int, seed: int) -> Float[Tensor, "resamples rows"]:
    """Weights of the mean difference as it is, then of those of prompts drawn with replacement."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for size in (sample.n, len(sample) - sample.n):
        drawn = torch.randint(size, (resamples, size), generator=generator)
        counts = torch.zeros(resamples, size).double().scatter_add_(1, drawn, torch.ones_like(drawn).double())
        made.append(torch.cat([torch.ones(1, size).double(), counts]) / size)
    return torch.cat([made[0], -made[1]], 1)


def compute_angles(gram: Float[Tensor, "rows rows"], weights: Float[Tensor, "all rows"]) -> Float[Tensor, " resamples"]:
    """Degrees between the first weights' vector and each of the others'; 90 where one of them is zero."""
    along = weights @ gram
    products, squares = along @ weights[0], (along * weights).sum(1).clamp(min=0)
    return torch.rad2deg(torch.arccos(_cosine(products[1:], squares[1:], squares[0])))


def compute_half_agreement(
    gram: Float[Tensor, "rows rows"], parts: Float[Tensor, "splits 2 rows"], order: Int[Tensor, "draws rows"]
) -> Float[Tensor, " draws"]:
    """Mean cosine of the halves' mean differences, the rows standing as each draw has them."""
    splits, rows = len(parts), order.shape[1]
    made = []
    for some in order.split(CHUNK):
        spots = some[:, None].expand(-1, 2 * splits, -1)
        weights = torch.zeros(len(some), 2 * splits, rows, dtype=gram.dtype)
        weights.scatter_(2, spots, parts.reshape(1, 2 * splits, rows).expand(len(some), -1, -1))
        both, along = weights.unflatten(1, (splits, 2)), (weights @ gram).unflatten(1, (splits, 2))
        products, squares = (along[:, :, 0] * both[:, :, 1]).sum(2), (along * both).sum(3).clamp(min=0)
        made.append(_cosine(products, squares[..., 0], squares[..., 1]).mean(1))
    return torch.cat(made)


def _cosine(products: Tensor, one: Tensor, two: Tensor) -> Tensor:
    size = (one * two).sqrt()
    return torch.where(size > 0, products / torch.where(size > 0, size, 1.0), 0.0).clamp(-1, 1)


def _shares(chosen: Float[Tensor, "splits n"]) -> Float[Tensor, "splits n"]:
    return chosen / chosen.sum(1, keepdim=True)
