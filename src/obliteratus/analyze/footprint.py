"""How much of each writer's weight lies along the directions, and on how few of its columns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from obliteratus.analyze.base import AnalysisContext, analyses
from obliteratus.analyze.chance import draw_chance_subspaces
from obliteratus.analyze.samples import LEVEL, Level, Sample, chance_interval, familywise_p_values, read_sample
from obliteratus.core.shapes import Float
from obliteratus.core.types import Site, Subject
from obliteratus.report.curves import BLUE, GREEN, GREY, ORANGE, Figure, add_legend
from obliteratus.summon.sites import read_gain
from obliteratus.weights.matrices import expand_experts, read_weight

RANDOM = 99  # random labelings: p = 0.01 at best, and as many products with each matrix
MAJORITY = 0.8  # of the footprint: what a few columns must hold together to be called few
COLORS = (BLUE, ORANGE, GREEN, "#CC79A7", "#E69F00")  # by part, in the order of the sites


@dataclass(frozen=True)
class Footprint:
    """For each writer matrix, its weight along the directions of the stream that it writes into."""

    sites: tuple[str, ...]
    """The parameter's name, and of a stack the expert."""
    parts: tuple[str, ...]
    layers: tuple[int, ...]
    share: Float[Tensor, " sites"]
    """Share of the matrix's Frobenius norm along the directions; √(k / width) along evenly drawn ones."""
    share_by_chance: Float[Tensor, "ends sites"]
    """2.5 % and 97.5 % quantiles over directions of random labels."""
    share_p: Float[Tensor, " sites"]
    """The probability that directions of random labels have as large a share, corrected for all sites and both
    numbers (share and Gini coefficient)."""
    gini: Float[Tensor, " sites"]
    """Gini coefficient of the columns' squared lengths along the directions: 0 if all are equal, 2/π for Gaussian
    weights, near 1 if a few hold everything."""
    gini_by_chance: Float[Tensor, "ends sites"]
    gini_p: Float[Tensor, " sites"]
    columns: Float[Tensor, " sites"]
    """Smallest share of the columns that together hold `MAJORITY` of the squared footprint."""
    level: float
    draws: int

    @property
    def significant(self) -> tuple[str, ...]:
        """Sites that write along the directions beyond chance."""
        return tuple(s for s, p in zip(self.sites, self.share_p.tolist(), strict=True) if p <= self.level)

    @property
    def sparse(self) -> tuple[str, ...]:
        """Sites whose footprint is on fewer columns than that of random labels."""
        return tuple(s for s, p in zip(self.sites, self.gini_p.tolist(), strict=True) if p <= self.level)

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers by site, in the model's order."""
        return {
            "random_labelings": self.draws,
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
        """Return how many matrices write along the directions beyond chance, and the one that does most."""
        n = len(self.sites)
        if not n:
            return "no matrix writes into a stream that has a direction"
        if not self.significant:
            few = f"; {len(self.sparse)} on fewer columns than chance" if self.sparse else ""
            return f"none of {n} matrices writes along the directions more than along those of {self._tested}{few}"
        top = max(self.significant, key=lambda s: float(self.share[self.sites.index(s)]))
        share = float(self.share[self.sites.index(top)])
        return (
            f"{len(self.significant)} of {n} matrices write along the directions more than along those of "
            f"{self._tested}, most {top} ({share:.1%} of its norm); {len(self.sparse)} on fewer columns than chance"
        )

    @property
    def _tested(self) -> str:
        return f"{self.draws} random labelings (level {self.level:g} over all)"

    def draw(self, figure: Figure) -> None:
        """Draw the share, and beside it the columns, over layers with a color for each part."""
        left, right = figure.subplots(1, 2)
        for part, color in zip(dict.fromkeys(self.parts), COLORS, strict=False):
            sites = [i for i, p in enumerate(self.parts) if p == part]
            layers = [self.layers[i] for i in sites]
            left.plot(layers, self.share[sites].tolist(), ".", color=color, label=part)
            right.plot(layers, self.columns[sites].tolist(), ".", color=color, label=part)
        low, high = self.share_by_chance.tolist()
        left.vlines(self.layers, low, high, color=GREY, lw=3, alpha=0.5, label="random labels, 95 %", zorder=0)
        left.set(xlabel="layer", ylabel="share of the norm along it", ylim=(0, None))
        right.set(xlabel="layer", ylabel=f"share of columns with {MAJORITY:.0%} of it", ylim=(0, 1))
        add_legend(left)
        add_legend(right)


@analyses.register("footprint", cite="doi:10.2307/2223319", needs=("rows",))
def measure_footprint(
    context: AnalysisContext,
    *,
    draws: Annotated[int, Field(ge=19, le=10_000)] = RANDOM,
    level: Level = LEVEL,
    seed: int = 0,
) -> Footprint:
    """Measure the share of each writer's weight along the directions, and how unevenly its columns hold it.

    W is the weight as it reaches the stream; behind a norm with gain γ that is diag(γ) W. With v = Q W, where Q holds
    the k directions of the stream that W writes into, the share is ‖v‖/‖W‖ (Frobenius), and the Gini coefficient
    (1921) is that of the columns' ‖v_j‖². Both are compared with ``draws`` spans of k differences of means under random
    labels at the same stream (`draw_chance_directions`). Where labels mean nothing, a difference of means stands out at
    any matrix, by either number, in at most a share ``level`` of cases; for other directions it is only a comparison.

    A footprint says what a weight can write, not how often its inputs are active. Writers into a stream without
    directions are left out. Matrices are read one at a time; time: draws × parameters of the writers. Needs rows, and
    four prompts of each group.
    """
    sample = read_sample(context.activations, "footprint", least=4)
    subspaces = _draw_subspaces(context.directions.basis, sample, draws, seed)
    measured = [
        (name, site, measure_subspace_shares(weight, subspaces[:, site.stream].to(weight)).double())
        for name, site, weight in iterate_writer_matrices(context.subject)
        if subspaces[0, site.stream].any()
    ]
    table = torch.stack([values for _, _, values in measured], 2) if measured else torch.zeros(3, draws + 1, 0).double()
    share, gini, columns = table
    p = familywise_p_values(torch.cat([share, gini], 1))
    return Footprint(
        sites=tuple(name for name, _, _ in measured),
        parts=tuple(site.part for _, site, _ in measured),
        layers=tuple(site.layer for _, site, _ in measured),
        share=share[0],
        share_by_chance=chance_interval(share),
        share_p=p[: len(measured)],
        gini=gini[0],
        gini_by_chance=chance_interval(gini),
        gini_p=p[len(measured) :],
        columns=columns[0],
        level=level,
        draws=draws,
    )


def iterate_writer_matrices(subject: Subject) -> Iterator[tuple[str, Site, Float[Tensor, "width inp"]]]:
    """Yield the name, site and weight of each writer, of stacks each expert's, as it reaches the stream; fp32."""
    for stack in (site for site in subject.sites if site.role == "writes"):
        module = subject.module(stack.path)
        for site in expand_experts(module, stack):
            weight, gain = read_weight(module, site), read_gain(subject.model, site)
            name = site.parameter if site.expert is None else f"{site.parameter}[{site.expert}]"
            yield name, site, weight if gain is None else gain.to(weight)[:, None] * weight


def measure_subspace_shares(
    weight: Float[Tensor, "width inp"], rows: Float[Tensor, "draws k width"]
) -> Float[Tensor, "3 draws"]:
    """Return each subspace's share of the norm, its columns' Gini coefficient, and their share with `MAJORITY`."""
    energy = torch.stack([(subspace @ weight).square().sum(0) for subspace in rows])
    size = weight.norm().clamp(min=torch.finfo(weight.dtype).tiny)
    return torch.stack([energy.sum(1).sqrt() / size, gini(energy), find_smallest_share(energy)])


def gini(values: Float[Tensor, "draws n"]) -> Float[Tensor, " draws"]:
    """Return the mean absolute difference of all pairs over twice the mean: 0 if all are equal, at most 1 − 1/n.

    0 where all values are zero.
    """
    ordered, n = values.double().sort(1).values, values.shape[1]
    place = 2 * torch.arange(1, n + 1, dtype=torch.float64) - n - 1
    total = ordered.sum(1)
    return torch.where(total > 0, ordered @ place / (n * torch.where(total > 0, total, 1.0)), 0.0).to(values)


def find_smallest_share(values: Float[Tensor, "draws n"]) -> Float[Tensor, " draws"]:
    """Return the smallest share of the values that together hold `MAJORITY` of their sum."""
    running = values.double().sort(1, descending=True).values.cumsum(1)
    needed = (running < MAJORITY * running[:, -1:]).sum(1) + 1
    return (needed / values.shape[1]).to(values)


def _draw_subspaces(
    basis: Float[Tensor, "streams k width"], sample: Sample, draws: int, seed: int
) -> Float[Tensor, "all streams k width"]:
    """Return the directions, then those of random labels; rows are zero where the directions' rows are zero."""
    streams, k, _ = basis.shape
    chance = torch.stack([draw_chance_subspaces(sample, s, k, draws, seed) for s in range(streams)], 1)
    return torch.cat([basis[None], chance.to(basis) * basis.any(2, keepdim=True)])
