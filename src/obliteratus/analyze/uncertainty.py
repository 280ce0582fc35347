"""How well the prompts determine the mean difference: by resampling them and by halving them."""

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

SPLITS = 5  # halvings whose cosines are averaged: that of a single one depends on which prompts fall into which half
PERMUTATIONS = 199  # × SPLITS halvings: p = 0.005 at best
CHUNK = 64  # permutations at a time: 3 MB with 600 prompts and 5 halvings
RESAMPLES = 500  # the 95 % quantile then rests on 25 of them


@dataclass(frozen=True)
class Uncertainty:
    """Uncertainty of the mean difference at each stream."""

    angle: Float[Tensor, " streams"]
    """Median angle to the mean difference of resampled prompts, in degrees."""
    angle_high: Float[Tensor, " streams"]
    """95 % of resamples are nearer than this."""
    halves: Float[Tensor, " streams"]
    """Cosine between the mean differences of two halves of the prompts, averaged over halvings."""
    chance: Float[Tensor, "ends streams"]
    """2.5 % and 97.5 % quantiles of ``halves`` under permuted labels."""
    p: Float[Tensor, " streams"]
    """p values of ``halves``, corrected for all streams."""
    level: float
    n: tuple[int, int]
    """Target and control prompts."""

    @property
    def significant(self) -> tuple[int, ...]:
        """Streams whose halves agree beyond chance."""
        return tuple((self.p <= self.level).nonzero().flatten().tolist())

    def to_dict(self) -> dict[str, Any]:
        """Return angles in degrees and cosines beside chance, by stream."""
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
        """Return how many streams have a direction that halves agree on, and the most certain one."""
        n = f"{self.n[0]} and {self.n[1]} prompts, level {self.level:g}"
        if not self.significant:
            return f"no direction that two halves of the prompts agree on beyond chance ({n})"
        best = min(self.significant, key=lambda s: float(self.angle[s]))
        return (
            f"{len(self.significant)} of {len(self.p)} streams have a direction that halves agree on; the most certain "
            f"is at {best}: ±{float(self.angle_high[best]):.0f}° (95 %), halves' cosine {float(self.halves[best]):.2f} "
            f"({n})"
        )

    def draw(self, figure: Figure) -> None:
        """Draw the angles, and beside them the cosines."""
        left, right = figure.subplots(1, 2)
        plot_curve(left, self.angle, "median", BLUE)
        plot_curve(left, self.angle_high, "95 % are below", ORANGE)
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
    """Measure how far another sample of prompts would turn the mean difference, and whether two halves agree on it.

    Angles come from a bootstrap (Efron 1979): prompts are drawn with replacement within each group, and the angle is
    to the mean difference of all prompts, 90° where there is none. They say how much of a direction is noise; near 90°
    they are optimistic, since a resample shares prompts with the whole. The halves share none: their cosine is near 0
    where there is no difference, and p compares it with ``draws`` permutations of the labels: where these mean nothing,
    any stream is found in at most a share ``level`` of cases. Needs rows, and four prompts of each group.
    """
    sample = read_sample(context.activations, "uncertainty", least=4)
    order = draw_permutations(len(sample), draws, seed)
    halves = draw_half_weights(sample, splits, seed + 1)
    resampled = draw_bootstrap_weights(sample, resamples, seed + 2)
    angles, agreements = [], []
    for gram in sample.grams():
        angles.append(compute_angles(gram, resampled))
        agreements.append(compute_half_agreement(gram, halves, order))
    agreement, angle = torch.stack(agreements, 1), torch.stack(angles, 1)
    return Uncertainty(
        angle=angle.median(0).values,
        angle_high=torch.quantile(angle, 0.95, dim=0),
        halves=agreement[0],
        chance=chance_interval(agreement),
        p=familywise_p_values(agreement),
        level=level,
        n=(sample.n, len(sample) - sample.n),
    )


def draw_half_weights(sample: Sample, splits: int, seed: int) -> Float[Tensor, "splits 2 rows"]:
    """Return weights that give the mean differences of two disjoint halves, each with half of either group.

    In a group with an odd number of prompts the second half has one more.
    """
    generator = torch.Generator().manual_seed(seed)
    n, m = sample.n, len(sample) - sample.n
    sides = [(torch.rand(splits, size, generator=generator).argsort(1) < size // 2).double() for size in (n, m)]
    target, control = (torch.stack([_normalize(side), _normalize(1 - side)], 1) for side in sides)
    return torch.cat([target, -control], 2)


def draw_bootstrap_weights(sample: Sample, resamples: int, seed: int) -> Float[Tensor, "all rows"]:
    """Return weights that give the mean difference as observed, then those of prompts drawn with replacement."""
    generator = torch.Generator().manual_seed(seed)
    weights = []
    for size in (sample.n, len(sample) - sample.n):
        picks = torch.randint(size, (resamples, size), generator=generator)
        counts = torch.zeros(resamples, size).double().scatter_add_(1, picks, torch.ones_like(picks).double())
        weights.append(torch.cat([torch.ones(1, size).double(), counts]) / size)
    return torch.cat([weights[0], -weights[1]], 1)


def compute_angles(gram: Float[Tensor, "rows rows"], weights: Float[Tensor, "all rows"]) -> Float[Tensor, " resamples"]:
    """Return the degrees between the first weights' vector and each other one's; 90 where one of them is zero."""
    along = weights @ gram
    products, squares = along @ weights[0], (along * weights).sum(1).clamp(min=0)
    return torch.rad2deg(torch.arccos(_compute_cosine(products[1:], squares[1:], squares[0])))


def compute_half_agreement(
    gram: Float[Tensor, "rows rows"], halves: Float[Tensor, "splits 2 rows"], order: Int[Tensor, "draws rows"]
) -> Float[Tensor, " draws"]:
    """Return the mean cosine of the halves' mean differences, with the rows in each order."""
    splits, rows = len(halves), order.shape[1]
    cosines = []
    for chunk in order.split(CHUNK):
        places = chunk[:, None].expand(-1, 2 * splits, -1)
        weights = torch.zeros(len(chunk), 2 * splits, rows, dtype=gram.dtype)
        weights.scatter_(2, places, halves.reshape(1, 2 * splits, rows).expand(len(chunk), -1, -1))
        both, along = weights.unflatten(1, (splits, 2)), (weights @ gram).unflatten(1, (splits, 2))
        products, squares = (along[:, :, 0] * both[:, :, 1]).sum(2), (along * both).sum(3).clamp(min=0)
        cosines.append(_compute_cosine(products, squares[..., 0], squares[..., 1]).mean(1))
    return torch.cat(cosines)


def _compute_cosine(products: Tensor, one: Tensor, two: Tensor) -> Tensor:
    size = (one * two).sqrt()
    return torch.where(size > 0, products / torch.where(size > 0, size, 1.0), 0.0).clamp(-1, 1)


def _normalize(chosen: Float[Tensor, "splits n"]) -> Float[Tensor, "splits n"]:
    return chosen / chosen.sum(1, keepdim=True)
