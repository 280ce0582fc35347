"""What the analyses share: two groups' rows, scores on held-out folds, and p values by permuting labels.

Everything is computed from the rows' products with each other (their Gram matrix), stream by stream: a permutation of
the labels then costs a product of prompts × prompts, whatever the width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from obliteratus.core.errors import UserError
from obliteratus.core.shapes import Bool, Float, Int
from obliteratus.core.types import Activations
from obliteratus.distill.steps import NEGLIGIBLE_DIFFERENCE

FOLDS = 5  # 80 % fit each direction: nearly all prompts, and five directions cost five products
DRAWS = 400  # p = 0.05 then rests on 20 permutations of the labels, and its standard error is 0.01
ROOM = 2**23  # numbers that permutations hold at once, a few times over: 64 MB of fp64
LEVEL = 0.05  # of all that is called found, over all streams together

Folds = Annotated[int, Field(ge=2, le=50)]
Draws = Annotated[int, Field(ge=19, le=100_000)]
"""At least 19: fewer permutations cannot give p = 0.05."""
Level = Annotated[float, Field(gt=0, lt=1)]
Rows = Float[Tensor, "rows width"]


@dataclass(frozen=True)
class Sample:
    """Two groups of rows. In all that follows, row i < n is target prompt i, the others are the control's."""

    target: Float[Tensor, "target streams width"]
    control: Float[Tensor, "control streams width"]

    @property
    def n(self) -> int:
        """Target rows."""
        return len(self.target)

    @property
    def streams(self) -> int:
        return self.target.shape[1]

    def __len__(self) -> int:
        return len(self.target) + len(self.control)

    def at(self, stream: int, standardize: bool = False) -> Rows:
        """One stream's rows, fp64, about the mean of all. Where all are the same but for rounding: zeros.

        standardize: each dimension also over its standard deviation in both groups together. Both are blind to labels.
        """
        rows = torch.cat([self.target[:, stream], self.control[:, stream]]).double()
        mean = rows.mean(0)
        rows = rows - mean
        if rows.square().sum(1).mean().sqrt() <= NEGLIGIBLE_DIFFERENCE * mean.norm():
            return torch.zeros_like(rows)
        if not standardize:
            return rows
        spread = rows.square().mean(0).sqrt()
        flat = spread <= NEGLIGIBLE_DIFFERENCE * (spread + mean.abs())
        return torch.where(flat, 0.0, rows / torch.where(flat, 1.0, spread))

    def grams(self, standardize: bool = False) -> Iterator[Float[Tensor, "rows rows"]]:
        """Each stream's products of rows, one stream at a time."""
        for stream in range(self.streams):
            rows = self.at(stream, standardize)
            yield rows @ rows.T


def sample_of(acts: Activations, name: str, least: int = 2) -> Sample:
    """Target and control rows. UserError where rows were not kept, or a group has fewer than ``least`` prompts."""
    rows = [rows_of(acts, group, name) for group in ("target", "control")]
    if min(len(x) for x in rows) < least:
        raise UserError(
            f"analysis '{name}' needs at least {least} prompts of target and of control to fit on; "
            f"got {' and '.join(str(len(x)) for x in rows)}"
        )
    return Sample(*rows)


def rows_of(acts: Activations, group: str, name: str) -> Float[Tensor, "prompts streams width"]:
    """A group's kept rows. UserError where only moments were kept."""
    rows = acts[group].rows
    if rows is None:
        raise UserError(f"analysis '{name}' needs every prompt's activations; set probe.keep = \"rows\"")
    return rows


@dataclass(frozen=True)
class FoldPlan:
    """Which fold each row is in, and the weights by which the other folds' rows make a direction and its middle."""

    fold: Int[Tensor, " rows"]
    weights: Float[Tensor, "folds rows"]
    """Σ weights · rows is the mean difference of the rows outside the fold."""
    middle: Float[Tensor, "folds rows"]
    """Σ middle · rows is half way between these rows' means."""
    n: int

    def outside(self, fold: int) -> Bool[Tensor, " rows"]:
        return self.fold != fold


def split_folds(n: int, m: int, folds: int, seed: int = 0) -> FoldPlan:
    """Folds of both groups, as equal as they can be; at most as many as the smaller group has prompts."""
    folds = min(folds, n, m)
    generator = torch.Generator().manual_seed(seed)
    fold = torch.cat([torch.randperm(size, generator=generator) % folds for size in (n, m)])
    side = torch.cat([torch.ones(n), -torch.ones(m)]).double()
    outside = (fold[None] != torch.arange(folds)[:, None]).double()
    counts = torch.stack([outside[:, :n].sum(1), outside[:, n:].sum(1)], 1)
    share = outside / torch.cat([counts[:, :1].expand(-1, n), counts[:, 1:].expand(-1, m)], 1)
    return FoldPlan(fold, share * side, share / 2, n)


def held_out_projections(
    gram: Float[Tensor, "rows rows"], plan: FoldPlan, order: Int[Tensor, "draws rows"]
) -> Float[Tensor, "draws rows"]:
    """Each row's place along the unit mean difference of the other folds, from half way between their means.

    order: which row stands at each place; places i < n are the target's. The rows as they are: one draw, 0, 1, 2 …
    In the stream's own units. Zeros where the other folds' means are equal.
    """
    folds = len(plan.weights)
    spots = order[:, None].expand(-1, folds, -1)
    weights = torch.zeros(len(order), folds, order.shape[1], dtype=gram.dtype)
    weights.scatter_(2, spots, plan.weights.expand(len(order), -1, -1))
    along = (weights @ gram).gather(2, spots)
    length = (along * plan.weights).sum(2, keepdim=True).clamp(min=0).sqrt()
    middle = (along * plan.middle).sum(2, keepdim=True)
    scores = torch.where(length > 0, (along - middle) / length.clamp(min=torch.finfo(gram.dtype).tiny), 0.0)
    return scores.gather(1, plan.fold.expand(len(order), 1, -1))[:, 0]


def identity_order(rows: int) -> Int[Tensor, "1 rows"]:
    return torch.arange(rows)[None]


def permuted_orders(rows: int, draws: int, seed: int = 0) -> Int[Tensor, "draws rows"]:
    """The rows as they are, then ``draws`` permutations of them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.arange(rows), *(torch.randperm(rows, generator=generator) for _ in range(draws))])


def d_prime(one: Float[Tensor, "... n"], two: Float[Tensor, "... m"]) -> Float[Tensor, "..."]:
    """Difference of the means in units of the groups' own standard deviation (root of the mean of the variances)."""
    spread = ((one.var(-1) + two.var(-1)) / 2).sqrt()
    gap = one.mean(-1) - two.mean(-1)
    return torch.where(spread > 0, gap / torch.where(spread > 0, spread, 1.0), 0.0)


def permutation_null(
    gram: Float[Tensor, "rows rows"], plan: FoldPlan, order: Int[Tensor, "draws rows"]
) -> Float[Tensor, " draws"]:
    """Held-out d′ of the rows as each draw has them, as many draws at a time as there is room for."""
    chunk = max(1, ROOM // plan.weights.numel())
    scores = torch.cat([held_out_projections(gram, plan, part) for part in order.split(chunk)])
    return d_prime(scores[:, : plan.n], scores[:, plan.n :])


def standardize(statistics: Float[Tensor, "draws streams"]) -> Float[Tensor, "draws streams"]:
    """Each stream's statistic in standard deviations from its mean over the draws; zeros where it never varies."""
    spread = statistics.std(0)
    return torch.where(spread > 0, (statistics - statistics.mean(0)) / torch.where(spread > 0, spread, 1.0), 0.0)


def familywise_p_values(statistics: Float[Tensor, "draws streams"]) -> Float[Tensor, " streams"]:
    """p values that hold for all streams together: Westfall and Young's single step (1993), large values count.

    Draw 0 is what was observed, the others are what chance made. How often the largest of a draw's standardized
    statistics reaches the observed one; with the observed one counted, so that p is never below 1 / draws and,
    whatever the streams have in common, at most a share p of chance's draws has any p as small.
    """
    if statistics.shape[1] == 0:
        return statistics[0]
    z = standardize(statistics)
    largest = z.max(1).values
    return (largest[:, None] >= z[:1]).double().mean(0)


def chance_interval(draws: Float[Tensor, "draws streams"]) -> Float[Tensor, "ends streams"]:
    """2.5 % and 97.5 % quantiles of what chance made: the draws behind the first."""
    if draws.shape[1] == 0:
        return draws[:2]
    return torch.quantile(draws[1:], torch.tensor([0.025, 0.975], dtype=draws.dtype), dim=0)


def thresholds(statistics: Float[Tensor, "draws streams"], level: float) -> Float[Tensor, " streams"]:
    """What a stream's statistic must exceed for `familywise_p_values` to call it found, by the draws behind the first."""
    largest = standardize(statistics)[1:].max(1).values
    return statistics.mean(0) + torch.quantile(largest, 1 - level) * statistics.std(0)
