"""Self-repair: what later layers write back of a direction that earlier ones may no longer write. By experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from obliteratus.analyze.base import GROUPS, AnalysisContext, Stream, analyses, choose_direction, subsample
from obliteratus.analyze.samples import LEVEL, Level
from obliteratus.analyze.significance import draw_unit_vectors
from obliteratus.core.cost import Cost, constant, prompt_count, variable
from obliteratus.core.progress import SILENT, progress, report_to
from obliteratus.core.results import Score
from obliteratus.core.shapes import Float
from obliteratus.core.types import Plan, PromptSet, Subject
from obliteratus.distill.steps import NEGLIGIBLE_DIFFERENCE
from obliteratus.excise.live.hooks_per_row import applied_per_row
from obliteratus.excise.writers import remove_from_writers
from obliteratus.inference.chat_template import Ids, render_prompts
from obliteratus.inference.hidden_states import read_hidden_states
from obliteratus.report.curves import BLUE, GREY, ORANGE
from obliteratus.verify.intervals import RESAMPLES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Of the groups' difference at the last stream: what is taken, and what is written back, beyond this share is worth a
# word. Of less than that, any write is a multiple: on the organism 0.01 was taken at layer 4, and 43 of 381 came.
LEAST = 0.05
RANDOM = 19  # p is then 1 in 20 at best: the level


@dataclass(frozen=True)
class Repair:
    """Differences between the groups (target − control) along one direction, in the stream's unit."""

    direct: Float[Tensor, " streams"]
    """Of the model as it is."""
    depths: tuple[int, ...]
    """Layers l: the direction is taken from all that layers up to l write, embeddings too."""
    left: Float[Tensor, " depths"]
    """Of the last stream then."""
    extra: tuple[Score, ...]
    """What the layers above l write more than they do in the model as it is: compared stream by stream."""
    restored: Float[Tensor, " depths"]
    """extra in units of what was taken away, direct[l + 1]: 1 where all of it comes back, 0 where later layers write
    what they always do, below 0 where they lean on it; 0 where little was taken (5 % of the last difference)."""
    p: Float[Tensor, " depths"]
    """That random directions, of which so many were tried, have as much written back at any depth."""
    chance: float
    """The most that is written back at any depth of all but a share ``level`` of the random directions."""
    level: float

    @property
    def significant(self) -> list[int]:
        """Depths from which layers write the direction back: extra, of the sign of what was taken, lies beyond chance.

        p is at most the level, and all of its interval is worth a word (5 % of the last difference).
        """
        floor = LEAST * abs(float(self.direct[-1]))
        low = [s.low if self.direct[d + 1] >= 0 else -s.high for d, s in zip(self.depths, self.extra, strict=True)]
        real = (self.restored != 0) & (self.p <= self.level)  # there was something to write back
        return [depth for depth, value, r in zip(self.depths, low, real, strict=True) if r and value > floor]

    def to_dict(self) -> dict[str, Any]:
        """What was taken, what came back, with intervals, and what random directions give."""
        depths = [
            {"layer": layer, "taken": float(self.direct[layer + 1]), "left": left, "restored": share}
            | {"extra": extra.model_dump(), "p": p}
            for layer, left, share, extra, p in zip(
                self.depths, self.left.tolist(), self.restored.tolist(), self.extra, self.p.tolist(), strict=True
            )
        ]
        chance = {"chance": self.chance, "level": self.level}
        return {"direct": self.direct.tolist(), "depths": depths, **chance, "found": self.significant}

    def summary(self) -> str:
        """Where most comes back."""
        if not self.significant:
            return "no layer writes the direction back beyond what random directions show"
        places = [self.depths.index(depth) for depth in self.significant]
        best = max(places, key=lambda i: float(self.restored[i]))
        return (
            f"self-repair: with the direction taken up to layer {self.depths[best]}, later layers write back "
            f"{100 * float(self.restored[best]):.0f} % of it ({len(self.significant)} of {len(self.depths)} depths show some)"
        )

    def draw(self, figure: Figure) -> None:
        """The difference as it is, and what later layers write back, by depth."""
        axes = figure.add_subplot(xlabel="taken up to layer", ylabel="Δ along d", title="what comes back")
        axes.plot(range(-1, len(self.direct) - 1), self.direct.tolist(), color=GREY, label="as it is, behind the layer")
        axes.plot(self.depths, self.left.tolist(), "o-", color=BLUE, label="left at the last stream")
        values = [score.value for score in self.extra]
        bars = [[v - s.low for v, s in zip(values, self.extra, strict=True)]]
        bars += [[s.high - v for v, s in zip(values, self.extra, strict=True)]]
        axes.errorbar(self.depths, values, yerr=bars, fmt="o-", color=ORANGE, label="written back beyond that")
        axes.axhspan(-self.chance, self.chance, color=GREY, alpha=0.3, label="random directions")
        axes.legend()


def _cost(options: Mapping[str, Any]) -> Cost:
    each = sum((prompt_count("fit", group, options["prompts"]) for group in GROUPS), constant(0))
    return Cost(each * (constant(1) + variable("L", options["depths"]) * (1 + options["random"])))


@analyses.register("repair", cite="arXiv:2307.15771", cost=_cost)
def measure_repair(
    context: AnalysisContext,
    *,
    stream: Stream = None,
    prompts: Annotated[int, Field(ge=2)] = 8,
    depths: Annotated[int, Field(ge=1)] = 8,
    random: Annotated[int, Field(ge=19, le=1000)] = RANDOM,
    level: Level = LEVEL,
    seed: int = 0,
) -> Repair:
    """How much of the direction later layers write back once earlier ones cannot write it (the Ouroboros effect).

    The direction is taken from the writers of layers up to l, embeddings too, by live edits; what the layers above add
    to the groups' difference along it is compared with what they add in the model as it is. The same is done with
    ``random`` random directions: p is the share, the direction itself counted, that have as much written back at one
    depth or another, so that of directions drawn by chance at most a share ``level`` is ever found. stream: whose first
    direction, the best-scored if None. prompts: fit prompts of each group, at most. depths: how many l are tried,
    evenly spread from layer 0 to the last but one.
    """
    subject, aim = context.subject, choose_direction(context, stream, "repair")
    layers = _spread(subject.n_layers - 1, depths)
    chosen = subsample(context.prompts, prompts)
    units = torch.cat([aim.vector[None], draw_unit_vectors(random, subject.width, seed)])
    found = _measured(subject, chosen, layers, units, context.activations.position)
    return _judged(found[0], layers, torch.stack([compute_written_back(one, layers) for one in found]), level, seed)


def _spread(n: int, most: int) -> tuple[int, ...]:
    """At most so many of 0 … n − 1, evenly, both ends among them."""
    if n <= most:
        return tuple(range(n))
    return tuple(sorted({round(i * (n - 1) / max(most - 1, 1)) for i in range(most)}))


# ------------------------------------------------------------------------------------------- measuring
Measured = tuple[Float[Tensor, "plans a streams"], Float[Tensor, "plans b streams"]]
"""Streams along a direction, of target and of control prompts; the first plan is the model as it is."""


def _measured(
    subject: Subject, prompts: PromptSet, layers: Sequence[int], units: Float[Tensor, "n width"], position: int
) -> list[Measured]:
    """Of each direction. The model as it is runs once for all of them."""
    ids = [render_prompts(subject, prompts[group]) for group in GROUPS]
    rows, n = [row for group in ids for row in group], len(ids[0])
    found = []
    with progress("ANALYZE repair", len(units)) as advance, report_to(SILENT):
        before = _along(subject, [Plan()], rows, units, position)
        for i, unit in enumerate(units):
            plans = [remove_from_writers(subject, unit[None], range(-1, layer + 1)) for layer in layers]
            after = _along(subject, plans, rows, unit[None], position)
            along = torch.cat([before[..., i], after[..., 0]])
            found.append((along[:, :n], along[:, n:]))
            advance(1)
    return found


def _along(
    subject: Subject, plans: Sequence[Plan], rows: Ids, units: Float[Tensor, "n width"], position: int
) -> Float[Tensor, "plans rows streams n"]:
    """Streams of all rows under each plan, along the directions; fp64."""
    along = torch.empty(len(plans) * len(rows), subject.n_layers + 1, len(units), dtype=torch.float64)
    with applied_per_row(subject, plans, [plan for plan in range(len(plans)) for _ in rows]):
        for got in read_hidden_states(subject, list(rows) * len(plans), position=position):
            along[got.rows] = got.stream.double() @ units.double().T
    return along.view(len(plans), len(rows), -1, len(units))


def compute_group_differences(measured: Measured, seed: int | None = None) -> Float[Tensor, "plans streams draws"]:
    """Differences of the groups' means: one draw, of all prompts; with a seed, bootstrap resamples of each group."""
    means = []
    for i, rows in enumerate(measured):
        weights = torch.full((1, rows.shape[1]), 1 / rows.shape[1]).double()
        if seed is not None:
            generator = torch.Generator().manual_seed(seed + i)
            picks = torch.randint(rows.shape[1], (RESAMPLES, rows.shape[1]), generator=generator)
            weights = torch.zeros(picks.shape).double().scatter_add_(1, picks, weights.expand(picks.shape))
        means.append(torch.einsum("pas,da->psd", rows, weights))
    return means[0] - means[1]


def compute_compensation(
    delta: Float[Tensor, "plans streams draws"], layers: Sequence[int]
) -> Float[Tensor, "depths draws"]:
    """What the layers above each depth write, less what they write in the model as it is."""
    places = torch.tensor(layers) + 1
    above = delta[1:, -1] - delta[1:][torch.arange(len(layers)), places]
    return above - (delta[0, -1] - delta[0, places])


def compute_written_back(measured: Measured, layers: Sequence[int]) -> Float[Tensor, " depths"]:
    """What is written back at each depth: `compute_compensation`, above zero where it has the sign of what was there."""
    delta = compute_group_differences(measured)
    sign = torch.where(delta[0, torch.tensor(layers) + 1, 0] >= 0, 1.0, -1.0)
    return sign * compute_compensation(delta, layers)[:, 0]


def compute_single_step_p_values(back: Float[Tensor, "draws depths"]) -> Float[Tensor, " depths"]:
    """How often a draw's largest reaches the first draw's at each depth, itself counted: p for all depths together.

    Not standardized by depth (`family_wise`): of twenty values none lies more than 4.3 standard deviations from their
    mean, so that one odd random direction at one depth would hide any repair at another.
    """
    return (back.max(1).values[:, None] >= back[:1]).double().mean(0)


def _judged(
    measured: Measured, layers: tuple[int, ...], back: Float[Tensor, "draws depths"], level: float, seed: int
) -> Repair:
    delta, drawn = (
        compute_group_differences(measured),
        compute_compensation(compute_group_differences(measured, seed), layers),
    )
    values = compute_compensation(delta, layers)[:, 0]
    ends = torch.quantile(drawn, torch.tensor([0.025, 0.975]).double(), dim=1)  # 95 %
    n = sum(rows.shape[1] for rows in measured)
    places = torch.tensor(layers) + 1
    taken = delta[0, places, 0] - delta[1:, :, 0][torch.arange(len(layers)), places]
    least = (
        LEAST * float(delta[0, -1, 0].abs()),
        NEGLIGIBLE_DIFFERENCE * sum(float(rows[0].abs().mean()) for rows in measured),
    )
    real = taken.abs() > max(least)
    return Repair(
        direct=delta[0, :, 0].float(),
        depths=layers,
        left=delta[1:, -1, 0].float(),
        extra=tuple(_score(v, low, high, n) for v, low, high in zip(values, *ends, strict=True)),
        restored=torch.where(real, values / taken, 0.0).float(),
        p=compute_single_step_p_values(back),
        chance=float(torch.quantile(back[1:].max(1).values, 1 - level, interpolation="higher")),
        level=level,
    )


def _score(value: Tensor, low: Tensor, high: Tensor, n: int) -> Score:
    v = float(value)
    return Score(value=v, low=min(v, float(low)), high=max(v, float(high)), n=n, unit="stream")
