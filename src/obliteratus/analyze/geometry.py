"""How the directions of different streams relate: signed cosines, runs that agree, and how far one persists."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import nan
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from obliteratus.analyze.base import AnalysisContext, analyses
from obliteratus.analyze.certificate import certify_sample
from obliteratus.analyze.samples import DRAWS, FOLDS, LEVEL, Draws, Level, Sample, draw_permutations, read_sample
from obliteratus.core.shapes import Float
from obliteratus.report.curves import GREY, Figure, add_legend, plot_curve, plot_matrix

ALIKE = 0.7  # cos 45°: nearer to the direction than to anything at right angles to it
PERMUTATIONS = 50  # for the mean cosine by chance: its standard error is a seventh of the cosines' spread


@dataclass(frozen=True)
class Geometry:
    """Comparison of the streams' first directions."""

    cosine: Float[Tensor, "streams streams"]
    """Signed; zero where a stream has no direction."""
    significant: tuple[int, ...]
    """Streams at which the groups differ beyond chance; at others a direction means nothing."""
    clusters: tuple[tuple[int, ...], ...]
    """Runs of adjacent significant streams whose pairs all have a cosine of at least ``alike``."""
    reach: tuple[int, ...]
    """For each significant stream, how many significant streams after it are alike, up to the first that is not."""
    chance: Float[Tensor, " lags"]
    """Mean cosine of mean differences ``lag`` streams apart under permuted labels: noise persists in a stream too."""
    alike: float
    level: float
    n: int
    """Prompts."""

    @property
    def persistence(self) -> Float[Tensor, " lags"]:
        """Mean cosine of significant streams that are ``lag`` apart, from lag 0; NaN where no two are."""
        return _average_by_lag(self.cosine, self.significant)

    def to_dict(self) -> dict[str, Any]:
        """Return all numbers by stream."""
        return {
            "prompts": self.n,
            "alike": self.alike,
            "level": self.level,
            "found": list(self.significant),
            "clusters": [list(c) for c in self.clusters],
            "reach": list(self.reach),
            "persistence": _replace_nan(self.persistence),
            "persistence_by_chance": _replace_nan(self.chance),
            "cosine": self.cosine.tolist(),
        }

    def summary(self) -> str:
        """Return the runs of streams that agree, and how many streams a direction lasts."""
        if not self.significant:
            return f"no stream has a direction beyond chance ({self.n} prompts, level {self.level:g})"
        runs = ", ".join(f"{c[0]}–{c[-1]}" if len(c) > 1 else str(c[0]) for c in self.clusters)
        median = sorted(self.reach)[len(self.reach) // 2]
        return (
            f"{len(self.significant)} of {len(self.cosine)} streams have a direction, in runs {runs} (cosines ≥ "
            f"{self.alike:g}); half of them last {median} streams or more ({self.n} prompts, level {self.level:g})"
        )

    def draw(self, figure: Figure) -> None:
        """Draw the cosines, and beside them how they fall with the distance between streams."""
        left, right = figure.subplots(1, 2)
        plot_matrix(figure, left, self.cosine, [str(i) for i in range(len(self.cosine))], "cosine")
        left.set(xlabel="stream index", ylabel="stream index")
        plot_curve(right, self.persistence, "streams that differ")
        plot_curve(right, self.chance, "labels permuted", GREY)
        right.set(xlabel="streams apart", ylabel="mean cosine", ylim=(-1.05, 1.05))
        add_legend(right)


@analyses.register("geometry", needs=("rows",))
def compare_directions(
    context: AnalysisContext,
    *,
    alike: Annotated[float, Field(gt=0, le=1)] = ALIKE,
    level: Level = LEVEL,
    draws: Draws = DRAWS,
    seed: int = 0,
) -> Geometry:
    """Compare the streams' first directions by signed cosines, and find runs of streams that agree.

    A stream at which a `certify` test of ``level`` finds no difference counts as having no direction: what is there is
    noise, which the residual stream also carries on and which would look persistent. Every pair within a run is alike,
    so that a slow turn is not chained into one run. A direction that changes sign has a cosine of −1 and ends a run.
    Where labels mean nothing, any stream is said to have a direction in at most a share ``level`` of cases. Needs rows.
    """
    sample = read_sample(context.activations, "geometry", least=4)
    tested = certify_sample(sample, level=level, draws=draws, folds=FOLDS, standardize=True, seed=seed)
    rows = normalize(context.directions.basis[:, 0].double(), dim=1)
    cosine = rows @ rows.T
    significant = [s for s in tested.significant if cosine[s, s] > 0]
    permuted = permute_cosines(sample, seed)
    chance = _average_by_lag(permuted, permuted.diagonal().nonzero().flatten().tolist())
    reach = tuple(_count_alike(cosine, significant[i:], alike) for i in range(len(significant)))
    runs = find_similar_runs(cosine, significant, alike)
    return Geometry(cosine, tuple(significant), runs, reach, chance, alike, level, len(sample))


def find_similar_runs(
    cosine: Float[Tensor, "streams streams"], streams: Sequence[int], alike: float
) -> tuple[tuple[int, ...], ...]:
    """Split the streams into runs of adjacent ones, each stream alike to all of its run, greedily from the first."""
    runs: list[list[int]] = []
    for stream in streams:
        joins = runs and runs[-1][-1] == stream - 1 and bool((cosine[stream, runs[-1]] >= alike).all())
        if joins:
            runs[-1].append(stream)
        else:
            runs.append([stream])
    return tuple(map(tuple, runs))


def permute_cosines(sample: Sample, seed: int) -> Float[Tensor, "streams streams"]:
    """Return the mean cosine of the streams' mean differences over permutations of the labels.

    All streams share the same permutations.
    """
    order = draw_permutations(len(sample), PERMUTATIONS, seed)[1:]
    side = torch.cat([torch.ones(sample.n) / sample.n, -torch.ones(len(sample) - sample.n) / (len(sample) - sample.n)])
    weights = torch.zeros(order.shape).double().scatter_(1, order, side.double().expand(order.shape))
    deltas = torch.stack([normalize(weights @ sample.at(s), dim=1) for s in range(sample.streams)], 1)
    return torch.einsum("bsw,btw->st", deltas, deltas) / PERMUTATIONS


def _count_alike(cosine: Float[Tensor, "streams streams"], streams: Sequence[int], alike: float) -> int:
    """Return how many of the streams after the first are alike to it, up to the first that is not."""
    for steps, stream in enumerate(streams[1:]):
        if cosine[streams[0], stream] < alike:
            return steps
    return len(streams) - 1


def _average_by_lag(cosine: Float[Tensor, "streams streams"], streams: Sequence[int]) -> Float[Tensor, " streams"]:
    """Return, for each lag, the mean cosine of pairs (a, b) of these streams with b − a = lag; NaN without pairs."""
    chosen = cosine[list(streams)][:, list(streams)]
    index = torch.tensor(list(streams), dtype=torch.long)
    lags = index[None] - index[:, None]
    pairs = [chosen[lags == lag] for lag in range(len(cosine))]
    return torch.stack([p.mean() if len(p) else cosine.new_tensor(nan) for p in pairs])


def _replace_nan(values: Float[Tensor, " lags"]) -> list[float | None]:
    """Return the values with None for NaN, which JSON does not have."""
    return [None if value != value else value for value in values.tolist()]
