"""Self-repair: what later layers write back of a direction that earlier layers are kept from writing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from obliteratus.analyze.base import GROUPS, AnalysisContext, Stream, analyses, choose_direction, subsample
from obliteratus.analyze.chance import draw_chance_directions
from obliteratus.analyze.samples import LEVEL, Level, compute_single_step_p_values, read_sample
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
from obliteratus.report.curves import BLUE, GREY, ORANGE, Figure

# Removed and written-back amounts below this share of the groups' difference at the last stream are not reported:
# any write is a multiple of a tiny amount. On the organism 0.01 of 381 was removed at layer 4, and 43 came back.
MIN_SHARE = 0.05
RANDOM = 19  # random labelings: p is then 1 in 20 at best, which is the level
RESAMPLES = 2000  # the 2.5 % quantile then rests on 50 resamples


@dataclass(frozen=True)
class Repair:
    """Differences between the groups (target − control) along one direction, in the stream's unit."""

    direct: Float[Tensor, " streams"]
    """The differences in the original model."""
    depths: tuple[int, ...]
    """Layers l: the direction is removed from all that the embeddings and layers up to l write."""
    remaining: Float[Tensor, " depths"]
    """The difference at the last stream after that removal."""
    extra: tuple[Score, ...]
    """What the layers above l write more than in the original model."""
    restored: Float[Tensor, " depths"]
    """extra as a share of what was removed: 1 if all of it comes back, 0 if later layers write what they always do,
    below 0 if they rely on it; 0 where less than 5 % of the last difference was removed."""
    p: Float[Tensor, " depths"]
    """The share of directions, this one and those of random labels, that have as much written back at any depth."""
    chance: float
    """The most that is written back at any depth, of all but a share ``level`` of random labels' directions."""
    level: float

    @property
    def significant(self) -> list[int]:
        """Depths from which later layers write the direction back beyond chance.

        p is at most the level, and the whole interval of extra, with the sign of what was removed, exceeds 5 % of the
        last difference.
        """
        floor = MIN_SHARE * abs(float(self.direct[-1]))
        low = [s.low if self.direct[d + 1] >= 0 else -s.high for d, s in zip(self.depths, self.extra, strict=True)]
        possible = (self.restored != 0) & (self.p <= self.level)  # there was something to write back
        return [depth for depth, value, p in zip(self.depths, low, possible, strict=True) if p and value > floor]

    def to_dict(self) -> dict[str, Any]:
        """Return what was removed, what came back with intervals, and what directions of random labels give."""
        depths = [
            {"layer": layer, "taken": float(self.direct[layer + 1]), "left": remaining, "restored": share}
            | {"extra": extra.model_dump(), "p": p}
            for layer, remaining, share, extra, p in zip(
                self.depths, self.remaining.tolist(), self.restored.tolist(), self.extra, self.p.tolist(), strict=True
            )
        ]
        chance = {"chance": self.chance, "level": self.level}
        return {"direct": self.direct.tolist(), "depths": depths, **chance, "found": self.significant}

    def summary(self) -> str:
        """Return at which depth most comes back."""
        if not self.significant:
            return f"no layer writes the direction back beyond what random labels show (level {self.level:g})"
        best = max(map(self.depths.index, self.significant), key=lambda i: float(self.restored[i]))
        return (
            f"self-repair: with the direction removed up to layer {self.depths[best]}, later layers write back "
            f"{100 * float(self.restored[best]):.0f} % of it ({len(self.significant)} of {len(self.depths)} depths "
            f"show some, level {self.level:g} over all)"
        )

    def draw(self, figure: Figure) -> None:
        """Draw the original difference, and what later layers write back, by depth."""
        axes = figure.add_subplot(xlabel="removed up to layer", ylabel="Δ along d", title="what is written back")
        axes.plot(range(-1, len(self.direct) - 1), self.direct.tolist(), color=GREY, label="original, after the layer")
        axes.plot(self.depths, self.remaining.tolist(), "o-", color=BLUE, label="left at the last stream")
        values = [score.value for score in self.extra]
        bars = [[v - s.low for v, s in zip(values, self.extra, strict=True)]]
        bars += [[s.high - v for v, s in zip(values, self.extra, strict=True)]]
        axes.errorbar(self.depths, values, yerr=bars, fmt="o-", color=ORANGE, label="written back")
        axes.axhspan(-self.chance, self.chance, color=GREY, alpha=0.3, label="random labels")
        axes.legend()


def _cost(options: Mapping[str, Any]) -> Cost:
    each = sum((prompt_count("search", group, options["prompts"]) for group in GROUPS), constant(0))
    return Cost(each * (constant(1) + variable("L", options["depths"]) * (1 + options["random"])))


@analyses.register("repair", cite="arXiv:2307.15771", needs=("rows",), cost=_cost)
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
    """Measure how much of the direction later layers write back once earlier ones cannot (the Ouroboros effect).

    Live edits remove the direction from the writers of the embeddings and of layers up to l. What the layers above add
    to the groups' difference along it is compared with what they add in the original model, and with the same for
    ``random`` differences of means under random labels (`draw_chance_directions`). p is the share of all directions,
    this one counted, that have as much written back at any depth. Where labels mean nothing, a difference of means is
    significant in at most a share ``level`` of cases. All is measured on prompts that no direction was fitted on.

    stream: the direction is this stream's first; None for the stream with the highest score. prompts: the most search
    prompts of each group. depths: how many l are tried, evenly spaced from layer 0 to the last but one. Needs rows, and
    four prompts of each group.
    """
    subject, aim = context.subject, choose_direction(context, stream, "repair")
    layers = _space_evenly(subject.n_layers - 1, depths)
    chosen = subsample(context.held_out, prompts)
    sample = read_sample(context.activations, "repair", least=4)
    units = torch.cat([aim.vector[None], draw_chance_directions(sample, aim.stream, random, seed)])
    measured = measure_directions(subject, chosen, layers, units, context.activations.position)
    back = torch.stack([compute_written_back(one, layers) for one in measured])
    return judge_repair(measured[0], layers, back, level, seed)


def _space_evenly(n: int, most: int) -> tuple[int, ...]:
    """Return at most ``most`` of 0 … n − 1, evenly spaced, with both ends."""
    if n <= most:
        return tuple(range(n))
    return tuple(sorted({round(i * (n - 1) / max(most - 1, 1)) for i in range(most)}))


# ------------------------------------------------------------------------------------------- measuring
Measured = tuple[Float[Tensor, "plans a streams"], Float[Tensor, "plans b streams"]]
"""Streams along a direction, of target and of control prompts; the first plan is the original model."""


def measure_directions(
    subject: Subject, prompts: PromptSet, layers: Sequence[int], units: Float[Tensor, "n width"], position: int
) -> list[Measured]:
    """Measure each direction under its removal at each depth. The original model runs once for all directions."""
    ids = [render_prompts(subject, prompts[group]) for group in GROUPS]
    rows, n = [row for group in ids for row in group], len(ids[0])
    measured = []
    with progress("ANALYZE repair", len(units)) as advance, report_to(SILENT):
        before = _project_streams(subject, [Plan()], rows, units, position)
        for i, unit in enumerate(units):
            plans = [remove_from_writers(subject, unit[None], range(-1, layer + 1)) for layer in layers]
            after = _project_streams(subject, plans, rows, unit[None], position)
            along = torch.cat([before[..., i], after[..., 0]])
            measured.append((along[:, :n], along[:, n:]))
            advance(1)
    return measured


def _project_streams(
    subject: Subject, plans: Sequence[Plan], rows: Ids, units: Float[Tensor, "n width"], position: int
) -> Float[Tensor, "plans rows streams n"]:
    """Return the streams of all rows under each plan along the directions; fp64."""
    along = torch.empty(len(plans) * len(rows), subject.n_layers + 1, len(units), dtype=torch.float64)
    with applied_per_row(subject, plans, [plan for plan in range(len(plans)) for _ in rows]):
        for batch in read_hidden_states(subject, list(rows) * len(plans), position=position):
            along[batch.rows] = batch.stream.double() @ units.double().T
    return along.view(len(plans), len(rows), -1, len(units))


# ------------------------------------------------------------------------------------------- comparing
def compute_group_differences(measured: Measured, seed: int | None = None) -> Float[Tensor, "plans streams draws"]:
    """Return the differences of the groups' means: one draw, or with a seed, bootstrap resamples of each group."""
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
    """Return what the layers above each depth write, minus what they write in the original model."""
    places = torch.tensor(layers) + 1
    above = delta[1:, -1] - delta[1:][torch.arange(len(layers)), places]
    return above - (delta[0, -1] - delta[0, places])


def compute_written_back(measured: Measured, layers: Sequence[int]) -> Float[Tensor, " depths"]:
    """Return `compute_compensation` at each depth, positive where it has the sign of what was removed."""
    delta = compute_group_differences(measured)
    sign = torch.where(delta[0, torch.tensor(layers) + 1, 0] >= 0, 1.0, -1.0)
    return sign * compute_compensation(delta, layers)[:, 0]


def judge_repair(
    measured: Measured, layers: tuple[int, ...], back: Float[Tensor, "draws depths"], level: float, seed: int
) -> Repair:
    """Return the result for one direction, given what is written back of it (the first draw) and of random ones."""
    delta = compute_group_differences(measured)
    resampled = compute_compensation(compute_group_differences(measured, seed), layers)
    values = compute_compensation(delta, layers)[:, 0]
    ends = torch.quantile(resampled, torch.tensor([0.025, 0.975]).double(), dim=1)  # 95 %
    n = sum(rows.shape[1] for rows in measured)
    places = torch.tensor(layers) + 1
    removed = delta[0, places, 0] - delta[1:, :, 0][torch.arange(len(layers)), places]
    size = sum(float(rows[0].abs().mean()) for rows in measured)
    worth_comparing = removed.abs() > max(MIN_SHARE * float(delta[0, -1, 0].abs()), NEGLIGIBLE_DIFFERENCE * size)
    return Repair(
        direct=delta[0, :, 0].float(),
        depths=layers,
        remaining=delta[1:, -1, 0].float(),
        extra=tuple(_make_score(v, low, high, n) for v, low, high in zip(values, *ends, strict=True)),
        restored=torch.where(worth_comparing, values / removed, 0.0).float(),
        p=compute_single_step_p_values(back),
        chance=float(torch.quantile(back[1:].max(1).values, 1 - level, interpolation="higher")),
        level=level,
    )


def _make_score(value: Tensor, low: Tensor, high: Tensor, n: int) -> Score:
    v = float(value)
    return Score(value=v, low=min(v, float(low)), high=max(v, float(high)), n=n, unit="stream")
