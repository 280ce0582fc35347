"""Whether the target's categories have directions of their own, or share one: the concept cone and its width."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from obliteratus.analyze.base import Ground, analyses
from obliteratus.analyze.curves import Figure, curve, matrix, range_of
from obliteratus.analyze.samples import LEVEL, Level, Sample, family_wise, orders, sample_of, usual
from obliteratus.errors import UserError
from obliteratus.results import Score
from obliteratus.shapes import Float, Int

LEAST = 5  # prompts of a category: with fewer, its mean is mostly noise
PERMUTATIONS = 199  # p = 0.005 at best
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
    """Between each two categories' directions, with bootstrap intervals."""
    rank: Float[Tensor, " streams"]
    """Effective rank of the categories' directions, 1 (all the same) to their number."""
    chance: Float[Tensor, "ends streams"]
    """2.5 % and 97.5 % quantiles of the same with categories permuted: what noise alone makes of it."""
    p: Float[Tensor, " streams"]
    """That a rank as high comes of permuted categories, corrected for all streams."""
    level: float

    @property
    def found(self) -> tuple[int, ...]:
        """Stream indices at which categories have directions of their own."""
        return tuple((self.p <= self.level).nonzero().flatten().tolist())

    def numbers(self) -> dict[str, Any]:
        """Cosines at one stream with their intervals, ranks at all."""
        pairs = [(i, j) for i in range(len(self.names)) for j in range(i)]
        return {
            "categories": dict(zip(self.names, self.counts, strict=True)),
            "stream": self.stream,
            "level": self.level,
            "found": list(self.found),
            "cosine": {f"{self.names[j]} / {self.names[i]}": self.cosine[i][j].model_dump() for i, j in pairs},
            "rank": self.rank.tolist(),
            "rank_by_chance_low": self.chance[0].tolist(),
            "rank_by_chance_high": self.chance[1].tolist(),
            "p": self.p.tolist(),
        }

    def told(self) -> str:
        size = f"{len(self.names)} categories of {min(self.counts)} to {max(self.counts)} prompts"
        rank = f"effective rank {float(self.rank[self.stream]):.2f} at stream {self.stream}, by chance "
        rank += f"{float(self.chance[0, self.stream]):.2f} to {float(self.chance[1, self.stream]):.2f}"
        if not self.found:
            return f"categories share one direction as far as can be told: {rank} ({size})"
        return f"categories have directions of their own at {len(self.found)} streams: {rank} ({size})"

    def draw(self, figure: Figure) -> None:
        """Cosines beside ranks."""
        left, right = figure.subplots(1, 2)
        values = torch.tensor([[score.value for score in row] for row in self.cosine])
        matrix(figure, left, values, self.names, "cosine")
        left.set(xlabel="category", ylabel="category", title=f"stream {self.stream}")
        curve(right, self.rank, "measured")
        range_of(right, self.chance[0], self.chance[1], "categories permuted, 95 %")
        right.set(xlabel="stream index", ylabel="effective rank")
        right.legend()


@analyses.register("cones", cite="arXiv:2502.17420", needs=("rows",))
def cones(
    ground: Ground,
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
    percentile intervals of prompts drawn anew; noise lowers them, the control mean that all share raises them.
    Categories with fewer than ``least`` prompts are left out; UserError where fewer than two are left. That categories
    differ is no sign that the behaviour does: topics have directions of their own, too. Needs rows.
    """
    sample = sample_of(ground.acts, "cones")
    names, member = memberships([p.category for p in ground.lab.prompts["target"]], least)
    at = int(ground.directions.score.argmax()) if stream is None else stream
    if at >= sample.streams:
        raise UserError(f"analysis 'cones': stream={at}, but streams run from 0 to {sample.streams - 1}")
    ranks = torch.stack([ranked(sample, s, member, draws, seed) for s in range(sample.streams)], 1)
    cosine = cosines(sample, at, member, resamples, seed + 1)
    counts = tuple(int(row.sum()) for row in member)
    return Cones(names, counts, at, cosine, ranks[0], usual(ranks), family_wise(ranks), level)


def memberships(categories: Sequence[str], least: int) -> tuple[tuple[str, ...], Float[Tensor, "categories prompts"]]:
    """Names of the categories that are large enough, and 1 for each prompt that is of one. An empty name is none."""
    counts = {name: categories.count(name) for name in dict.fromkeys(categories) if name}
    names = tuple(name for name, count in counts.items() if count >= least)
    if len(names) < 2:
        raise UserError(
            f"analysis 'cones' needs at least 2 categories of {least} target prompts; got "
            f"{', '.join(f'{name} {count}' for name, count in counts.items()) or 'none'}; give prompts a category"
        )
    return names, torch.tensor([[float(c == name) for c in categories] for name in names]).double()


def ranked(
    sample: Sample, stream: int, member: Float[Tensor, "categories prompts"], draws: int, seed: int
) -> Float[Tensor, " draws"]:
    """Effective rank of the categories' directions at one stream: as they are, then with categories permuted.

    Only prompts that are of a category change places.
    """
    rows, counted = sample.at(stream), member.any(0).nonzero().flatten()
    delta = rows[counted] - rows[sample.n :].mean(0)
    gram, kept = delta @ delta.T, member[:, counted]
    made = []
    for order in orders(len(counted), draws, seed):
        weights = _means(kept[:, order])
        made.append(effective_rank(_unit(weights @ gram @ weights.T)))
    return torch.stack(made)


def effective_rank(gram: Float[Tensor, "k k"]) -> Float[Tensor, ""]:
    """exp H of the shares of XXᵀ's eigenvalues, which are the squares of X's singular values; 0 where all are zero."""
    values = torch.linalg.eigvalsh(gram).clamp(min=0)
    total = values.sum()
    shares = values / torch.where(total > 0, total, 1.0)
    return torch.where(total > 0, torch.exp(-torch.xlogy(shares, shares).sum()), 0.0)


def cosines(
    sample: Sample, stream: int, member: Float[Tensor, "categories prompts"], resamples: int, seed: int
) -> tuple[tuple[Score, ...], ...]:
    """Between the categories' directions, with percentile intervals; prompts are drawn anew within each category."""
    rows, generator = sample.at(stream), torch.Generator().manual_seed(seed)
    groups = [row.nonzero().flatten() for row in member] + [torch.arange(sample.n, len(rows))]
    values = _between([rows[g].mean(0)[None] for g in groups])[0]
    drawn = _between([rows[g[_again(len(g), resamples, generator)]].mean(1) for g in groups])
    low, high = torch.quantile(drawn, torch.tensor([0.025, 0.975]).double(), dim=0)
    low, high = torch.minimum(low, values), torch.maximum(high, values)
    counts = member.sum(1).int().tolist()

    def score(i: int, j: int) -> Score:
        ends = {"low": float(low[i, j]), "high": float(high[i, j])}
        return Score(value=float(values[i, j]), **ends, n=counts[i] + counts[j] * (i != j), unit="cosine")

    return tuple(tuple(score(i, j) for j in range(len(member))) for i in range(len(member)))


def _between(means: Sequence[Float[Tensor, "resamples width"]]) -> Float[Tensor, "resamples k k"]:
    """Cosines between the categories' directions; the last mean is the control's."""
    unit = normalize(torch.stack(list(means[:-1]), 1) - means[-1][:, None], dim=2)
    return unit @ unit.mT


def _again(n: int, resamples: int, generator: torch.Generator) -> Int[Tensor, "resamples n"]:
    return torch.randint(n, (resamples, n), generator=generator)


def _means(member: Tensor) -> Tensor:
    return member / member.sum(1, keepdim=True)


def _unit(gram: Tensor) -> Tensor:
    """Products of rows made products of unit rows; zero rows stay."""
    size = gram.diagonal().clamp(min=0).sqrt()
    inverse = torch.where(size > 0, 1 / torch.where(size > 0, size, 1.0), 0.0)
    return inverse[:, None] * gram * inverse
