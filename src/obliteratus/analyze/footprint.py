"""How much of each writer's weight lies along the directions, and on how few of its columns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from obliteratus.analyze.base import AnalysisContext, analyses
from obliteratus.analyze.samples import LEVEL, Level, chance_interval, familywise_p_values
from obliteratus.core.shapes import Float
from obliteratus.core.types import Site, Subject
from obliteratus.report.curves import BLUE, GREEN, GREY, ORANGE, Figure, add_legend
from obliteratus.summon.sites import read_gain
from obliteratus.weights.matrices import expand_experts, read_weight

RANDOM = 99  # directions drawn by chance: p = 0.01 at best, and as many products with each matrix
MOST = 0.8  # of the footprint: what a few columns should hold to be called few
COLORS = (BLUE, ORANGE, GREEN, "#CC79A7", "#E69F00")  # by part, in the order of the sites


@dataclass(frozen=True)
class Footprint:
    """Of each writer matrix along the directions of the stream that it writes into."""

    sites: tuple[str, ...]
    """Where: the parameter, and of a stack the expert."""
    parts: tuple[str, ...]
    layers: tuple[int, ...]
    share: Float[Tensor, " sites"]
    """Of the matrix's Frobenius norm, what lies along the directions; chance is √(k / width)."""
    share_by_chance: Float[Tensor, "ends sites"]
    """2.5 % and 97.5 % quantiles over random directions."""
    share_p: Float[Tensor, " sites"]
    """That a random direction's is as large, corrected for all sites."""
    gini: Float[Tensor, " sites"]
    """Of the columns' squared parts along the directions: 0 all alike, near 1 a few hold all; Gaussian 2/π."""
    gini_by_chance: Float[Tensor, "ends sites"]
    gini_p: Float[Tensor, " sites"]
    columns: Float[Tensor, " sites"]
    """Least share of the columns that together hold `MOST` of it."""
    level: float
    draws: int

    @property
    def significant(self) -> tuple[str, ...]:
        """Sites that write along the directions beyond chance."""
        return tuple(s for s, p in zip(self.sites, self.share_p.tolist(), strict=True) if p <= self.level)

    @property
    def sparse(self) -> tuple[str, ...]:
        """Sites whose footprint stands on fewer columns than a random direction's."""
        return tuple(s for s, p in zip(self.sites, self.gini_p.tolist(), strict=True) if p <= self.level)

    def to_dict(self) -> dict[str, Any]:
        """By site, in the model's order."""
        return {
            "random_directions": self.draws,
            "level": self.level,
            "found": list(self.significant),
            "sparse": list(self.sparse),
            "site": list(self.sites),
            "share": self.share.tolist(),
            "share_by_chance_low": self.share_by_chance[0].tolist(),
            "share_by_chance_high": self.share_by_chance[1].tolist(),
            "share_p": self.share_p.tolist(),
            "gini": self.gini.tolist(),
            "gini_by_chance_low": self.gini_by_chance[0].tolist(),
            "gini_by_chance_high": self.gini_by_chance[1].tolist(),
            "gini_p": self.gini_p.tolist(),
            "columns_for_80_percent": self.columns.tolist(),
        }

    def summary(self) -> str:
        n = len(self.sites)
        if not n:
            return "no matrix writes into a stream that has a direction"
        if not self.significant:
            return f"none of {n} matrices writes along the directions more than along {self.draws} random ones"
        top = max(self.significant, key=lambda s: float(self.share[self.sites.index(s)]))
        at = self.sites.index(top)
        return (
            f"{len(self.significant)} of {n} matrices write along the directions more than along {self.draws} random ones, "
            f"most {top} ({float(self.share[at]):.1%} of its norm); {len(self.sparse)} on fewer columns than chance"
        )

    def draw(self, figure: Figure) -> None:
        """Share beside columns, over layers, a color for each part."""
        left, right = figure.subplots(1, 2)
        for part, color in zip(dict.fromkeys(self.parts), COLORS, strict=False):
            at = [i for i, p in enumerate(self.parts) if p == part]
            layers = [self.layers[i] for i in at]
            left.plot(layers, self.share[at].tolist(), ".", color=color, label=part)
            right.plot(layers, self.columns[at].tolist(), ".", color=color, label=part)
        low, high = self.share_by_chance.tolist()
        left.vlines(self.layers, low, high, color=GREY, lw=3, alpha=0.5, label="random, 95 %", zorder=0)
        left.set(xlabel="layer", ylabel="share of the norm along it", ylim=(0, None))
        right.set(xlabel="layer", ylabel=f"share of columns with {MOST:.0%} of it", ylim=(0, 1))
        add_legend(left)
        add_legend(right)


@analyses.register("footprint", cite="doi:10.2307/2223319")
def measure_footprint(
    context: AnalysisContext,
    *,
    draws: Annotated[int, Field(ge=19, le=10_000)] = RANDOM,
    level: Level = LEVEL,
    seed: int = 0,
) -> Footprint:
    """Of each writer's weight, the share along the directions, and how unevenly its columns hold it.

    W is what reaches the stream: behind a norm with gain γ, diag(γ) W. v = Q W, Q the k directions of the stream it
    writes into; the share is ‖v‖/‖W‖ (Frobenius), the Gini coefficient (1921) is that of the columns' ‖v_j‖². Both are
    compared with ``draws`` random subspaces of the same width and k, one for each stream. A weight's footprint says
    what could be written, not how often its inputs are active. Where a stream has no direction its writers are left
    out. One matrix at a time is read; time draws × parameters of the writers.
    """
    subspaces = _subspaces(context.directions.basis, draws, seed)
    found = [
        (name, site, measure_subspace_shares(weight, subspaces[:, site.stream].to(weight)).double())
        for name, site, weight in iterate_writer_matrices(context.subject)
        if subspaces[0, site.stream].any()
    ]
    made = torch.stack([one for _, _, one in found], 2) if found else torch.zeros(3, draws + 1, 0).double()
    share, gini, columns = made
    return Footprint(
        sites=tuple(name for name, _, _ in found),
        parts=tuple(site.part for _, site, _ in found),
        layers=tuple(site.layer for _, site, _ in found),
        share=share[0],
        share_by_chance=chance_interval(share),
        share_p=familywise_p_values(share),
        gini=gini[0],
        gini_by_chance=chance_interval(gini),
        gini_p=familywise_p_values(gini),
        columns=columns[0],
        level=level,
        draws=draws,
    )


def iterate_writer_matrices(subject: Subject) -> Iterator[tuple[str, Site, Float[Tensor, "width inp"]]]:
    """Name, site and weight of each writer as it reaches the stream, of stacks each expert's; fp32, one at a time."""
    for stack in (site for site in subject.sites if site.role == "writes"):
        module = subject.module(stack.path)
        for site in expand_experts(module, stack):
            weight, gain = read_weight(module, site), read_gain(subject.model, site)
            name = site.parameter if site.expert is None else f"{site.parameter}[{site.expert}]"
            yield name, site, weight if gain is None else gain.to(weight)[:, None] * weight


def measure_subspace_shares(
    weight: Float[Tensor, "width inp"], rows: Float[Tensor, "draws k width"]
) -> Float[Tensor, "3 draws"]:
    """Of each subspace: share of the norm along it, Gini coefficient of the columns, share of columns with `MOST`."""
    energy = torch.stack([(subspace @ weight).square().sum(0) for subspace in rows])
    size = weight.norm().clamp(min=torch.finfo(weight.dtype).tiny)
    return torch.stack([energy.sum(1).sqrt() / size, gini(energy), find_smallest_share(energy)])


def gini(values: Float[Tensor, "draws n"]) -> Float[Tensor, " draws"]:
    """Mean absolute difference of all pairs, over twice the mean: 0 all alike, 1 − 1/n one holds all. 0 for zeros."""
    ordered, n = values.double().sort(1).values, values.shape[1]
    place = 2 * torch.arange(1, n + 1, dtype=torch.float64) - n - 1
    total = ordered.sum(1)
    return torch.where(total > 0, ordered @ place / (n * torch.where(total > 0, total, 1.0)), 0.0).to(values)


def find_smallest_share(values: Float[Tensor, "draws n"]) -> Float[Tensor, " draws"]:
    """The least share of the values that together hold `MOST` of the sum."""
    running = values.double().sort(1, descending=True).values.cumsum(1)
    needed = (running < MOST * running[:, -1:]).sum(1) + 1
    return (needed / values.shape[1]).to(values)


def _subspaces(basis: Float[Tensor, "streams k width"], draws: int, seed: int) -> Float[Tensor, "all streams k width"]:
    """The directions, then random ones: orthonormal, and zero where the directions' rows are."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(draws, *basis.mT.shape, generator=generator, dtype=basis.dtype)
    there = basis.any(2, keepdim=True)
    return torch.cat([basis[None], torch.linalg.qr(noise)[0].mT * there])
