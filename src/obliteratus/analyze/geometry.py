"""How the layers' directions lie to each other: signed cosines, runs of layers that agree, how far one lasts."""

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
YARDSTICK = 50  # permutations whose mean cosine is what chance makes: the mean's error is a seventh of their spread


@dataclass(frozen=True)
class Geometry:
    """Row 0 of the directions at each stream index, compared."""

    cosine: Float[Tensor, "streams streams"]
    """Signed; zero where a stream has no direction."""
    significant: tuple[int, ...]
    """Stream indices where the groups differ beyond chance: only there a direction means something."""
    clusters: tuple[tuple[int, ...], ...]
    """Runs of neighboring found streams, all of whose pairs have a cosine of at least ``alike``."""
    reach: tuple[int, ...]
    """Of each found stream, how many found streams after it are still alike, up to the first that is not."""
    chance: Float[Tensor, " lags"]
    """Mean cosine of mean differences ``lag`` streams apart when labels are permuted: a stream keeps its noise too."""
    alike: float
    n: int

    @property
    def persistence(self) -> Float[Tensor, " lags"]:
        """Mean cosine of found streams that lie ``lag`` apart, from lag 0; NaN where no two do."""
        return _by_lag(self.cosine, self.significant)

    def to_dict(self) -> dict[str, Any]:
        """Everything, by stream index."""
        return {
            "prompts": self.n,
            "alike": self.alike,
            "found": list(self.significant),
            "clusters": [list(c) for c in self.clusters],
            "reach": list(self.reach),
            "persistence": _known(self.persistence),
            "persistence_by_chance": _known(self.chance),
            "cosine": self.cosine.tolist(),
        }

    def summary(self) -> str:
        if not self.significant:
            return f"no stream has a direction beyond chance ({self.n} prompts)"
        runs = ", ".join(f"{c[0]}–{c[-1]}" if len(c) > 1 else str(c[0]) for c in self.clusters)
        middle = sorted(self.reach)[len(self.reach) // 2]
        return (
            f"{len(self.significant)} of {len(self.cosine)} streams have a direction, in runs {runs} (cosines ≥ "
            f"{self.alike:g}); half of them last {middle} streams or more ({self.n} prompts)"
        )

    def draw(self, figure: Figure) -> None:
        """The cosines, and how they fall with the distance between streams."""
        left, right = figure.subplots(1, 2)
        plot_matrix(figure, left, self.cosine, [str(i) for i in range(len(self.cosine))], "cosine")
        left.set(xlabel="stream index", ylabel="stream index")
        plot_curve(right, self.persistence, "found streams")
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
    """Signed cosines between the layers' directions (row 0), the runs of layers that agree, and how far one lasts.

    Streams at which a `certificate` of ``level`` finds no difference count as having no direction: whatever stands
    there is noise, which a residual stream hands on as well, so that it would look persistent. Runs are contiguous and
    complete: every pair is alike, so that a slow turn is not chained into one. Signs are kept; a direction that turns
    over has a cosine of −1 and ends a run. Needs rows.
    """
    sample = read_sample(context.activations, "geometry", least=4)
    tested = certify_sample(sample, level=level, draws=draws, folds=FOLDS, standardize=True, seed=seed)
    rows = normalize(context.directions.basis[:, 0].double(), dim=1)
    cosine = rows @ rows.T
    found = [s for s in tested.significant if cosine[s, s] > 0]
    lasting = permute_cosines(sample, seed)
    chance = _by_lag(lasting, lasting.diagonal().nonzero().flatten().tolist())
    reach = tuple(_reach(cosine, found[i:], alike) for i in range(len(found)))
    return Geometry(cosine, tuple(found), find_similar_runs(cosine, found, alike), reach, chance, alike, len(sample))


def find_similar_runs(
    cosine: Float[Tensor, "streams streams"], found: Sequence[int], alike: float
) -> tuple[tuple[int, ...], ...]:
    """Neighboring streams, from the first on, as long as each is alike all of its run."""
    made: list[list[int]] = []
    for stream in found:
        joins = made and made[-1][-1] == stream - 1 and bool((cosine[stream, made[-1]] >= alike).all())
        if joins:
            made[-1].append(stream)
        else:
            made.append([stream])
    return tuple(map(tuple, made))


def permute_cosines(sample: Sample, seed: int) -> Float[Tensor, "streams streams"]:
    """Mean cosine of the streams' mean differences over permutations of the labels, the same ones at each stream."""
    order = draw_permutations(len(sample), YARDSTICK, seed)[1:]
    side = torch.cat([torch.ones(sample.n) / sample.n, -torch.ones(len(sample) - sample.n) / (len(sample) - sample.n)])
    weights = torch.zeros(YARDSTICK, len(sample)).double().scatter_(1, order, side.double().expand(YARDSTICK, -1))
    deltas = torch.stack([normalize(weights @ sample.at(s), dim=1) for s in range(sample.streams)], 1)
    return torch.einsum("bsw,btw->st", deltas, deltas) / YARDSTICK


def _reach(cosine: Float[Tensor, "streams streams"], found: Sequence[int], alike: float) -> int:
    """How many of the found streams behind the first are alike it, up to one that is not."""
    for steps, stream in enumerate(found[1:]):
        if cosine[found[0], stream] < alike:
            return steps
    return len(found) - 1


def _by_lag(cosine: Float[Tensor, "streams streams"], of: Sequence[int]) -> Float[Tensor, " streams"]:
    """Mean cosine of pairs (a, b) of these streams with b − a = lag; NaN where there is none."""
    kept = cosine[list(of)][:, list(of)]
    apart = torch.tensor(list(of), dtype=torch.long)
    lags = apart[None] - apart[:, None]
    means = [kept[lags == lag] for lag in range(len(cosine))]
    return torch.stack([m.mean() if len(m) else cosine.new_tensor(nan) for m in means])


def _known(values: Float[Tensor, " lags"]) -> list[float | None]:
    """JSON has no NaN."""
    return [None if value != value else value for value in values.tolist()]
