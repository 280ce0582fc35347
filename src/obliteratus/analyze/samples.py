"""What analyses of two groups' rows share: the sample, held-out folds, and p values from permuted labels.

Everything is computed from the rows' inner products (their Gram matrix), stream by stream, so that a permutation of
the labels costs one product of prompts × prompts whatever the model's width.
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

FOLDS = 5  # each direction is fitted on 80 % of the prompts, and five directions cost five products
DRAWS = 400  # p = 0.05 then rests on 20 permutations of the labels, and its standard error is 0.01
MOST_NUMBERS = 2**23  # that permutations hold at once, a few times over: 64 MB of fp64
LEVEL = 0.05  # of false positives over all streams together

Folds = Annotated[int, Field(ge=2, le=50)]
Draws = Annotated[int, Field(ge=19, le=100_000)]
"""At least 19, since fewer permutations cannot give p = 0.05."""
Level = Annotated[float, Field(gt=0, lt=1)]
Rows = Float[Tensor, "rows width"]


@dataclass(frozen=True)
class Sample:
    """Two groups of rows. Wherever rows are numbered, row i < n is target prompt i and the others are the control's."""

    target: Float[Tensor, "target streams width"]
    control: Float[Tensor, "control streams width"]

    @property
    def n(self) -> int:
        """Number of target rows."""
        return len(self.target)

    @property
    def streams(self) -> int:
        return self.target.shape[1]

    def __len__(self) -> int:
        return len(self.target) + len(self.control)

    def at(self, stream: int, standardize: bool = False) -> Rows:
        """Return one stream's rows minus their mean, fp64; zeros where all rows are equal up to rounding.

        standardize: divide each dimension by its standard deviation over both groups. Neither step sees the labels.
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
        """Yield each stream's inner products of rows, one stream at a time."""
        for stream in range(self.streams):
            rows = self.at(stream, standardize)
            yield rows @ rows.T


def read_sample(acts: Activations, name: str, least: int = 2) -> Sample:
    """Return the target and control rows.

    Raises UserError where rows were not kept or a group has fewer than ``least`` prompts. name: the analysis, for the
    error message.
    """
    rows = [read_rows(acts, group, name) for group in ("target", "control")]
    if min(len(x) for x in rows) < least:
        raise UserError(
            f"analysis '{name}' needs at least {least} target and {least} control prompts to fit on; "
            f"got {len(rows[0])} and {len(rows[1])}"
        )
    return Sample(*rows)


def read_rows(acts: Activations, group: str, name: str) -> Float[Tensor, "prompts streams width"]:
    """Return a group's rows. Raises UserError where only moments were kept."""
    rows = acts[group].rows
    if rows is None:
        raise UserError(f"analysis '{name}' needs every prompt's activations; set probe.keep = \"rows\"")
    return rows


# -------------------------------------------------------------------------------------------- held-out folds
@dataclass(frozen=True)
class FoldPlan:
    """The fold of each row, and the weights that give a direction and its midpoint from the rows outside a fold."""

    fold: Int[Tensor, " rows"]
    weights: Float[Tensor, "folds rows"]
    """Σ weights · rows is the mean difference of the rows outside the fold."""
    middle: Float[Tensor, "folds rows"]
    """Σ middle · rows is half way between the group means of the rows outside the fold."""
    n: int

    def outside(self, fold: int) -> Bool[Tensor, " rows"]:
        return self.fold != fold


def split_folds(n: int, m: int, folds: int, seed: int = 0) -> FoldPlan:
    """Split n target and m control rows into folds as equal as possible, at most as many as the smaller group has."""
    folds = min(folds, n, m)
    generator = torch.Generator().manual_seed(seed)
    fold = torch.cat([torch.randperm(size, generator=generator) % folds for size in (n, m)])
    side = torch.cat([torch.ones(n), -torch.ones(m)]).double()
    outside = (fold[None] != torch.arange(folds)[:, None]).double()
    counts = torch.stack([outside[:, :n].sum(1), outside[:, n:].sum(1)], 1)
    share = outside / torch.cat([counts[:, :1].expand(-1, n), counts[:, 1:].expand(-1, m)], 1)
    return FoldPlan(fold, share * side, share / 2, n)


def project_held_out(
    gram: Float[Tensor, "rows rows"], plan: FoldPlan, order: Int[Tensor, "draws rows"]
) -> Float[Tensor, "draws rows"]:
    """Return each row's coordinate along the unit mean difference of the other folds, 0 half way between their means.

    order: which row stands at each place; places i < n are the target's. The result is in the stream's own unit, and
    zero where the other folds' means are equal.
    """
    folds = len(plan.weights)
    places = order[:, None].expand(-1, folds, -1)
    weights = torch.zeros(len(order), folds, order.shape[1], dtype=gram.dtype)
    weights.scatter_(2, places, plan.weights.expand(len(order), -1, -1))
    along = (weights @ gram).gather(2, places)
    length = (along * plan.weights).sum(2, keepdim=True).clamp(min=0).sqrt()
    middle = (along * plan.middle).sum(2, keepdim=True)
    scores = torch.where(length > 0, (along - middle) / length.clamp(min=torch.finfo(gram.dtype).tiny), 0.0)
    return scores.gather(1, plan.fold.expand(len(order), 1, -1))[:, 0]


def d_prime(one: Float[Tensor, "... n"], two: Float[Tensor, "... m"]) -> Float[Tensor, "..."]:
    """Return the difference of the means over the root of the groups' mean variance; 0 where nothing varies."""
    spread = ((one.var(-1) + two.var(-1)) / 2).sqrt()
    gap = one.mean(-1) - two.mean(-1)
    return torch.where(spread > 0, gap / torch.where(spread > 0, spread, 1.0), 0.0)


# ---------------------------------------------------------------------------------------------- permutations
def identity_order(rows: int) -> Int[Tensor, "1 rows"]:
    return torch.arange(rows)[None]


def draw_permutations(rows: int, draws: int, seed: int = 0) -> Int[Tensor, "all rows"]:
    """Return the identity, then ``draws`` random permutations of the rows."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.arange(rows), *(torch.randperm(rows, generator=generator) for _ in range(draws))])


def permute_d_prime(
    gram: Float[Tensor, "rows rows"], plan: FoldPlan, order: Int[Tensor, "draws rows"]
) -> Float[Tensor, " draws"]:
    """Return the held-out d′ of the rows in each order, computed for as many orders at a time as memory allows."""
    chunk = max(1, MOST_NUMBERS // plan.weights.numel())
    scores = torch.cat([project_held_out(gram, plan, part) for part in order.split(chunk)])
    return d_prime(scores[:, : plan.n], scores[:, plan.n :])


def standardize(statistics: Float[Tensor, "draws streams"]) -> Float[Tensor, "draws streams"]:
    """Return each stream's statistic in standard deviations from its mean over draws; 0 where it does not vary."""
    spread = statistics.std(0)
    return torch.where(spread > 0, (statistics - statistics.mean(0)) / torch.where(spread > 0, spread, 1.0), 0.0)


def familywise_p_values(statistics: Float[Tensor, "draws streams"]) -> Float[Tensor, " streams"]:
    """Return p values that hold for all streams together: Westfall and Young's single step (1993), large is extreme.

    Draw 0 is the data as observed, the others are permutations. p is the share of draws whose largest standardized
    statistic reaches the observed one. The observed draw counts, so p is at least 1 / draws, and whatever the streams
    have in common, at most a share p of the permutations has any p as small.
    """
    if statistics.shape[1] == 0:
        return statistics[0]
    z = standardize(statistics)
    largest = z.max(1).values
    return (largest[:, None] >= z[:1]).double().mean(0)


def compute_single_step_p_values(values: Float[Tensor, "draws n"]) -> Float[Tensor, " n"]:
    """Return the share of draws whose largest value reaches the first draw's of each number: p for all n together.

    The first draw counts. Unlike in `familywise_p_values`, numbers are not standardized: of twenty values none is more
    than 4.3 standard deviations from their mean, so one odd draw of one number would hide any effect on another. They
    must have the same unit.
    """
    return (values.max(1).values[:, None] >= values[:1]).double().mean(0)


def chance_interval(draws: Float[Tensor, "draws streams"]) -> Float[Tensor, "ends streams"]:
    """Return the 2.5 % and 97.5 % quantiles over all draws but the first, which is the data as observed."""
    if draws.shape[1] == 0:
        return draws[:2]
    return torch.quantile(draws[1:], torch.tensor([0.025, 0.975], dtype=draws.dtype), dim=0)


def compute_thresholds(statistics: Float[Tensor, "draws streams"], level: float) -> Float[Tensor, " streams"]:
    """Return what each stream's statistic must exceed to be significant at ``level`` by `familywise_p_values`."""
    largest = standardize(statistics)[1:].max(1).values
    return statistics.mean(0) + torch.quantile(largest, 1 - level) * statistics.std(0)
