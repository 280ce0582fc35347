"""Whether the target's categories have directions of their own or share one (concept cones)."""

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

LEAST = 5  # prompts of a category: the mean of fewer is mostly noise
PERMUTATIONS = 199  # p = 0.005 at best
MIN_SQUARED_LENGTH = 1e-9  # where noise exceeds the signal, a length is taken as this to avoid a division by zero
RESAMPLES = 500  # the 2.5 % quantile then rests on 12 of them


@dataclass(frozen=True)
class Cones:
    """Directions of the categories: unit vectors from the control mean to each category's mean."""

    names: tuple[str, ...]
    counts: tuple[int, ...]
    """Prompts of each category."""
    stream: int
    """The stream of ``cosine``."""
    cosine: tuple[tuple[Score, ...], ...]
    """Cosines between categories, corrected for noise, with bootstrap intervals; 0 where a direction has no length."""
    rank: Float[Tensor, " streams"]
    """Effective rank of the categories' directions, from 1 (all equal) to the number of categories."""
    chance: Float[Tensor, "ends streams"]
    """2.5 % and 97.5 % quantiles of the effective rank with categories permuted."""
    p: Float[Tensor, " streams"]
    """The probability that permuted categories give a rank as high, corrected for all streams."""
    level: float

    @property
    def significant(self) -> tuple[int, ...]:
        """Streams at which categories have directions of their own."""
        return tuple((self.p <= self.level).nonzero().flatten().tolist())

    def to_dict(self) -> dict[str, Any]:
        """Return the cosines at one stream with their intervals, and the ranks at all streams."""
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
        """Return whether categories have directions of their own, with the effective rank beside chance."""
        size = f"{len(self.names)} categories, the smallest of {min(self.counts)} prompts, level {self.level:g}"
        rank = f"effective rank {float(self.rank[self.stream]):.2f} at stream {self.stream}, by chance "
        rank += f"{float(self.chance[0, self.stream]):.2f} to {float(self.chance[1, self.stream]):.2f}"
        if not self.significant:
            return f"no sign that categories have different directions: {rank} ({size})"
        return f"categories have directions of their own at {len(self.significant)} streams: {rank} ({size})"

    def draw(self, figure: Figure) -> None:
        """Draw the cosines, and beside them the ranks over streams."""
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
    """Test whether the target's categories lie in one direction from control or each in its own.

    The effective rank is exp of the entropy of the squared singular values' shares (Roy and Vetterli 2007; squares, so
    that shares are of energy) of the categories' unit directions. Few prompts alone push it above 1, so it is compared
    with ``draws`` random permutations of the categories: where these mean nothing, any stream is found in at most a
    share ``level`` of cases. Cosines have percentile intervals from resampled prompts and
    are corrected for noise, which would lower them (`compute_inner_products`). Different directions do not imply
    different behavior: topics have directions of their own, too. Needs rows.

    least: categories with fewer prompts are left out. stream: where cosines are taken; None for the stream whose
    directions have the highest score. Raises UserError where fewer than two categories remain.
    """
    sample = read_sample(context.activations, "cones")
    names, member = group_by_category([p.category for p in context.prompts["target"]], least)
    index = int(context.directions.score.argmax()) if stream is None else stream
    if index >= sample.streams:
        raise UserError(f"analysis 'cones': stream={index}, but streams run from 0 to {sample.streams - 1}")
    ranks = torch.stack([compute_effective_ranks(sample, s, member, draws, seed) for s in range(sample.streams)], 1)
    cosine = compute_cosines(sample, index, member, resamples, seed + 1)
    counts = tuple(int(row.sum()) for row in member)
    return Cones(names, counts, index, cosine, ranks[0], chance_interval(ranks), familywise_p_values(ranks), level)


def group_by_category(
    categories: Sequence[str], least: int
) -> tuple[tuple[str, ...], Float[Tensor, "categories prompts"]]:
    """Return the names of the categories with at least ``least`` prompts, and 1 where a prompt is of a category.

    Prompts with an empty category belong to none. Raises UserError where fewer than two categories are large enough.
    """
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
) -> Float[Tensor, " all"]:
    """Return the effective rank of the categories' directions at one stream: as observed, then for each permutation.

    Only prompts that have a category are permuted.
    """
    rows, categorized = sample.at(stream), member.any(0).nonzero().flatten()
    delta = rows[categorized] - rows[sample.n :].mean(0)
    gram, member = delta @ delta.T, member[:, categorized]
    ranks = []
    for order in draw_permutations(len(categorized), draws, seed):
        weights = _normalize_rows(member[:, order])
        ranks.append(compute_effective_rank(_normalize_gram(weights @ gram @ weights.T)))
    return torch.stack(ranks)


def compute_effective_rank(gram: Float[Tensor, "k k"]) -> Float[Tensor, ""]:
    """Return exp of the entropy of the shares of a Gram matrix's eigenvalues; 0 where all are zero."""
    values = torch.linalg.eigvalsh(gram).clamp(min=0)
    total = values.sum()
    shares = values / torch.where(total > 0, total, 1.0)
    return torch.where(total > 0, torch.exp(-torch.xlogy(shares, shares).sum()), 0.0)


def compute_cosines(
    sample: Sample, stream: int, member: Float[Tensor, "categories prompts"], resamples: int, seed: int
) -> tuple[tuple[Score, ...], ...]:
    """Return the cosines between the categories' directions, corrected for noise, with percentile intervals.

    Prompts are resampled within each category and within control.
    """
    rows = sample.at(stream)
    control = torch.ones(1, len(rows) - sample.n).double()
    values = compute_inner_products(rows @ rows.T, bootstrap_category_weights(member, control, resamples, seed))
    counts = member.sum(1).int().tolist()
    size = values.diagonal(dim1=1, dim2=2)
    scale = (size[:, :, None].clamp(min=MIN_SQUARED_LENGTH) * size[:, None].clamp(min=MIN_SQUARED_LENGTH)).sqrt()
    cosines = (values / scale).clamp(-1, 1)  # a resample without length gives ±1, and the interval holds everything
    low, high = torch.quantile(cosines[1:], torch.tensor([0.025, 0.975]).double(), dim=0)
    value = torch.where((size[0, :, None] > 0) & (size[0] > 0), cosines[0], 0.0)

    def score(i: int, j: int) -> Score:
        if i == j:
            return Score(value=1.0, low=1.0, high=1.0, n=counts[i], unit="cosine")
        ends = {"low": min(float(low[i, j]), float(value[i, j])), "high": max(float(high[i, j]), float(value[i, j]))}
        return Score(value=float(value[i, j]), **ends, n=counts[i] + counts[j], unit="cosine")

    return tuple(tuple(score(i, j) for j in range(len(member))) for i in range(len(member)))


def bootstrap_category_weights(
    member: Float[Tensor, "categories target"], control: Float[Tensor, "1 control"], resamples: int, seed: int
) -> Float[Tensor, "draws groups rows"]:
    """Return weights that give the means of each category and, last, of control: as observed, then resampled."""
    generator = torch.Generator().manual_seed(seed)
    groups = torch.block_diag(member, control)
    weights = []
    for group in groups:
        rows = group.nonzero().flatten()
        picks = torch.randint(len(rows), (resamples, len(rows)), generator=generator)
        counts = torch.zeros(resamples, len(group)).double()
        counts.scatter_add_(1, rows[picks], torch.ones_like(picks).double())
        weights.append(torch.cat([group[None], counts]) / len(rows))
    return torch.stack(weights, 1)


def compute_inner_products(
    gram: Float[Tensor, "rows rows"], weights: Float[Tensor, "draws groups rows"]
) -> Float[Tensor, "draws categories categories"]:
    """Return inner products of the categories' differences from control, free of the noise of few prompts.

    The product of a mean with itself is taken over pairs of different prompts only (a U statistic), also where a
    prompt was drawn twice. With the prompts' own squares the cosine of two equal directions falls to 0.64 at 25
    prompts, 300 dimensions and a difference of 5 standard deviations, and every model would seem to have a cone.
    """
    raw = weights @ gram @ weights.mT
    squares = weights.square()
    free = (1 - squares.sum(2)).clamp(min=MIN_SQUARED_LENGTH)
    own = (raw.diagonal(dim1=1, dim2=2) - squares @ gram.diagonal()) / free
    raw = raw - torch.diag_embed(raw.diagonal(dim1=1, dim2=2)) + torch.diag_embed(own)
    cross = raw[:, :-1, -1]
    return raw[:, :-1, :-1] - cross[:, :, None] - cross[:, None] + raw[:, -1:, -1:]


def _normalize_rows(member: Tensor) -> Tensor:
    return member / member.sum(1, keepdim=True)


def _normalize_gram(gram: Tensor) -> Tensor:
    """Return the inner products of the rows scaled to unit length; zero rows stay zero."""
    size = gram.diagonal().clamp(min=0).sqrt()
    inverse = torch.where(size > 0, 1 / torch.where(size > 0, size, 1.0), 0.0)
    return inverse[:, None] * gram * inverse
