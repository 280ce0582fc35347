"""Whether the target's categories have directions of their own, or share one: the concept cone and its width."""

from __future__ import annotations

from collections.abc import Sequence
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
from obliteratus.core.errors import UserError
from obliteratus.core.results import Score
from obliteratus.core.shapes import Float
from obliteratus.report.curves import Figure, add_legend, plot_curve, plot_matrix, plot_range

LEAST = 5  # prompts of a category: with fewer, its mean is mostly noise
PERMUTATIONS = 199  # p = 0.005 at best
NO_LENGTH = 1e-9  # squared, where noise outweighs what is there: nothing is divided by zero
RESAMPLES = 500  # the 2.5 % quantile then rests on 12 of them


@dataclass(frozen=True)
class Cones:
    """Directions of the categories: of each the unit vector from the control mean to its own."""

    names: tuple[str, ...]
    counts: tuple[int, ...]
    """Prompts of each category."""
    stream: int
    """The stream index of ``cosine``."""
    cosine: tuple[tuple[Score, ...], ...]
    """Between each two categories' directions, noise taken out, with bootstrap intervals; 0 where one has no length."""
    rank: Float[Tensor, " streams"]
    """Effective rank of the categories' directions, 1 (all the same) to their number."""
    chance: Float[Tensor, "ends streams"]
    """2.5 % and 97.5 % quantiles of the same with categories permuted: what noise alone makes of it."""
    p: Float[Tensor, " streams"]
    """That a rank as high comes of permuted categories, corrected for all streams."""
    level: float

    @property
    def significant(self) -> tuple[int, ...]:
        """Stream indices at which categories have directions of their own."""
        return tuple((self.p <= self.level).nonzero().flatten().tolist())

    def to_dict(self) -> dict[str, Any]:
        """Cosines at one stream with their intervals, ranks at all."""
        pairs = [(i, j) for i in range(len(self.names)) for j in range(i)]
        return {
            "categories": dict(zip(self.names, self.counts, strict=True)),
            "stream": self.stream,
            "level": self.level,
            "found": list(self.significant),
            "cosine": {f"{self.names[j]} / {self.names[i]}": self.cosine[i][j].model_dump() for i, j in pairs},
            "rank": self.rank.tolist(),
            "rank_by_chance_low": self.chance[0].tolist(),
            "rank_by_chance_high": self.chance[1].tolist(),
            "p": self.p.tolist(),
        }

    def summary(self) -> str:
        size = f"{len(self.names)} categories, the smallest of {min(self.counts)} prompts"
        rank = f"effective rank {float(self.rank[self.stream]):.2f} at stream {self.stream}, by chance "
        rank += f"{float(self.chance[0, self.stream]):.2f} to {float(self.chance[1, self.stream]):.2f}"
        if not self.significant:
            return f"categories share one direction as far as can be told: {rank} ({size})"
        return f"categories have directions of their own at {len(self.significant)} streams: {rank} ({size})"

    def draw(self, figure: Figure) -> None:
        """Cosines beside ranks."""
        left, right = figure.subplots(1, 2)
        values = torch.tensor([[score.value for score in row] for row in self.cosine])
        plot_matrix(figure, left, values, self.names, "cosine")
        left.set(xlabel="category", ylabel="category", title=f"stream {self.stream}")
        plot_curve(right, self.rank, "measured")
        plot_range(right, self.chance[0], self.chance[1], "categories permuted, 95 %")
        right.set(xlabel="stream index", ylabel="effective rank")
        add_legend(right)


@analyses.register("cones", cite="arXiv:2502.17420", needs=("rows",))
def measure_cones(
    context: AnalysisContext,
    *,
    least: Annotated[int, Field(ge=2)] = LEAST,
    stream: Annotated[int, Field(ge=0)] | None = None,
    draws: Annotated[int, Field(ge=19, le=100_000)] = PERMUTATIONS,
    resamples: Annotated[int, Field(ge=20, le=100_000)] = RESAMPLES,
    level: Level = LEVEL,
    seed: int = 0,
) -> Cones:
    """Do the target prompts' categories lie in one direction from control, or each in its own?

    Effective rank: exp of the entropy of the squared singular values' shares (Roy and Vetterli 2007, squares: shares
    of energy), of the categories' unit directions. Few prompts alone push it above 1, so it is compared with ``draws``
    random permutations of the categories. Cosines are at ``stream`` (None: the highest score of the directions), with
    percentile intervals of prompts drawn anew, and free of noise, which would lower them (`compute_inner_products`).
    Categories with fewer than ``least`` prompts are left out; UserError where fewer than two are left. That categories
    differ is no sign that the behavior does: topics have directions of their own, too. Needs rows.
    """
    sample = read_sample(context.activations, "cones")
    names, member = group_by_category([p.category for p in context.prompts["target"]], least)
    at = int(context.directions.score.argmax()) if stream is None else stream
    if at >= sample.streams:
        raise UserError(f"analysis 'cones': stream={at}, but streams run from 0 to {sample.streams - 1}")
    ranks = torch.stack([compute_effective_ranks(sample, s, member, draws, seed) for s in range(sample.streams)], 1)
    cosine = compute_cosines(sample, at, member, resamples, seed + 1)
    counts = tuple(int(row.sum()) for row in member)
    return Cones(names, counts, at, cosine, ranks[0], chance_interval(ranks), familywise_p_values(ranks), level)


def group_by_category(
    categories: Sequence[str], least: int
) -> tuple[tuple[str, ...], Float[Tensor, "categories prompts"]]:
    """Names of the categories that are large enough, and 1 for each prompt that is of one. An empty name is none."""
    counts = {name: categories.count(name) for name in dict.fromkeys(categories) if name}
    names = tuple(name for name, count in counts.items() if count >= least)
    if len(names) < 2:
        raise UserError(
            f"analysis 'cones' needs at least 2 categories of {least} target prompts; got "
            f"{', '.join(f'{name} {count}' for name, count in counts.items()) or 'none'}; give prompts a category"
        )
    return names, torch.tensor([[float(c == name) for c in categories] for name in names]).double()


def compute_effective_ranks(
    sample: Sample, stream: int, member: Float[Tensor, "categories prompts"], draws: int, seed: int
) -> Float[Tensor, " draws"]:
    """Effective rank of the categories' directions at one stream: as they are, then with categories permuted.

    Only prompts that are of a category change places.
    """
    rows, counted = sample.at(stream), member.any(0).nonzero().flatten()
    delta = rows[counted] - rows[sample.n :].mean(0)
    gram, kept = delta @ delta.T, member[:, counted]
    made = []
    for order in draw_permutations(len(counted), draws, seed):
        weights = _means(kept[:, order])
        made.append(compute_effective_rank(_unit(weights @ gram @ weights.T)))
    return torch.stack(made)


def compute_effective_rank(gram: Float[Tensor, "k k"]) -> Float[Tensor, ""]:
    """exp H of the shares of XXᵀ's eigenvalues, which are the squares of X's singular values; 0 where all are zero."""
    values = torch.linalg.eigvalsh(gram).clamp(min=0)
    total = values.sum()
    shares = values / torch.where(total > 0, total, 1.0)
    return torch.where(total > 0, torch.exp(-torch.xlogy(shares, shares).sum()), 0.0)


def compute_cosines(
    sample: Sample, stream: int, member: Float[Tensor, "categories prompts"], resamples: int, seed: int
) -> tuple[tuple[Score, ...], ...]:
    """Between the categories' directions, free of the noise of few prompts, with percentile intervals.

    Prompts are drawn anew within each category and within control.
    """
    rows = sample.at(stream)
    everyone = torch.ones(1, len(rows) - sample.n).double()
    values, counts = (
        compute_inner_products(rows @ rows.T, bootstrap_category_weights(member, everyone, resamples, seed)),
        member.sum(1).int().tolist(),
    )
    size = values.diagonal(dim1=1, dim2=2)
    scale = (size[:, :, None].clamp(min=NO_LENGTH) * size[:, None].clamp(min=NO_LENGTH)).sqrt()
    found = (values / scale).clamp(-1, 1)  # a draw without a length says ±1: the interval then holds everything
    low, high = torch.quantile(found[1:], torch.tensor([0.025, 0.975]).double(), dim=0)
    value = torch.where((size[0, :, None] > 0) & (size[0] > 0), found[0], 0.0)

    def score(i: int, j: int) -> Score:
        if i == j:
            return Score(value=1.0, low=1.0, high=1.0, n=counts[i], unit="cosine")
        ends = {"low": min(float(low[i, j]), float(value[i, j])), "high": max(float(high[i, j]), float(value[i, j]))}
        return Score(value=float(value[i, j]), **ends, n=counts[i] + counts[j], unit="cosine")

    return tuple(tuple(score(i, j) for j in range(len(member))) for i in range(len(member)))


def bootstrap_category_weights(
    member: Float[Tensor, "categories target"], control: Float[Tensor, "1 control"], resamples: int, seed: int
) -> Float[Tensor, "draws groups rows"]:
    """Weights of the means of each category and, last, of control: as they are, then of prompts drawn anew."""
    generator = torch.Generator().manual_seed(seed)
    groups = torch.block_diag(member, control)
    made = []
    for group in groups:
        rows = group.nonzero().flatten()
        again = torch.randint(len(rows), (resamples, len(rows)), generator=generator)
        counts = torch.zeros(resamples, len(group)).double()
        counts.scatter_add_(1, rows[again], torch.ones_like(again).double())
        made.append(torch.cat([group[None], counts]) / len(rows))
    return torch.stack(made, 1)


def compute_inner_products(
    gram: Float[Tensor, "rows rows"], weights: Float[Tensor, "draws groups rows"]
) -> Float[Tensor, "draws categories categories"]:
    """Inner products of the categories' differences from control, of which noise is no part.

    A mean's product with itself is taken over pairs of different prompts only (a U statistic), also where a prompt was
    drawn twice. With their own squares the cosine of two directions that are one falls to 0.64 at 25 prompts, 300
    dimensions and a difference of 5 standard deviations, and every model has a cone.
    """
    raw = weights @ gram @ weights.mT
    squares = weights.square()
    free = (1 - squares.sum(2)).clamp(min=NO_LENGTH)
    own = (raw.diagonal(dim1=1, dim2=2) - squares @ gram.diagonal()) / free
    raw = raw - torch.diag_embed(raw.diagonal(dim1=1, dim2=2)) + torch.diag_embed(own)
    cross = raw[:, :-1, -1]
    return raw[:, :-1, :-1] - cross[:, :, None] - cross[:, None] + raw[:, -1:, -1:]


def _means(member: Tensor) -> Tensor:
    return member / member.sum(1, keepdim=True)


def _unit(gram: Tensor) -> Tensor:
    """Products of rows made products of unit rows; zero rows stay."""
    size = gram.diagonal().clamp(min=0).sqrt()
    inverse = torch.where(size > 0, 1 / torch.where(size > 0, size, 1.0), 0.0)
    return inverse[:, None] * gram * inverse
