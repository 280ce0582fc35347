"""What removing each layer's directions does to control prompts, measured one layer at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from obliteratus.analyze.base import AnalysisContext, analyses
from obliteratus.analyze.chance import draw_chance_subspaces
from obliteratus.analyze.samples import LEVEL, Level, Sample, compute_single_step_p_values, read_sample
from obliteratus.core.cost import Cost, constant, prompt_count, variable
from obliteratus.core.progress import SILENT, progress, report_to
from obliteratus.core.results import Score
from obliteratus.core.shapes import Float
from obliteratus.core.types import Plan
from obliteratus.excise.live.hooks_per_row import applied_per_row
from obliteratus.excise.writers import remove_from_writers
from obliteratus.inference.cached_prompts import CachedPrompts
from obliteratus.inference.chat_template import render_prompts
from obliteratus.inference.logits import kl_divergence
from obliteratus.prompts import pick_evenly
from obliteratus.report.curves import BLUE, GREY, ORANGE, Figure
from obliteratus.verify.intervals import mean_score

NEGLIGIBLE_KL = 1e-6  # nats: a smaller KL is rounding; plots on a log scale begin here
# Bytes of outputs of the blocks below each edit, cached for the next layers: 32 short prompts of a small model take
# 10 MB.
CACHE_BYTES = 50e6
RANDOM = 19  # random labelings: p is then 1 in 20 at best, which is the level


@dataclass(frozen=True)
class Entanglement:
    """KL(original ‖ ablated) of the first token on control prompts, in nats, with one layer's writers edited alone."""

    kl: tuple[Score, ...]
    """KL of removing each layer's own directions; zero where it has none."""
    random: Float[Tensor, "layers draws"]
    """Mean KL of removing directions of random labels instead, as many as the layer has."""
    ratio: Float[Tensor, " layers"]
    """A layer's own KL over the mean KL of random labels' directions; 0 where it has no directions."""
    p: Float[Tensor, " layers"]
    """The share of labelings, this one and the random ones, whose ratio is as large at any layer."""
    level: float

    @property
    def significant(self) -> list[int]:
        """Layers whose directions matter more to control prompts than those of random labels do."""
        return (self.p <= self.level).nonzero().flatten().tolist()

    def to_dict(self) -> dict[str, Any]:
        """Return every layer's KL with its interval, beside those of random labels."""
        values = {"kl": [s.model_dump() for s in self.kl], "random": self.random.tolist()}
        tested = {"ratio": self.ratio.tolist(), "p": self.p.tolist(), "level": self.level, "found": self.significant}
        return {**values, **tested}

    def summary(self) -> str:
        """Return the layers that cost least and most, and those beyond chance."""
        values = [s.value for s in self.kl]
        worst, best = values.index(max(values)), values.index(min(values))
        ends = f"KL on controls {values[best]:.2g} (layer {best}) to {values[worst]:.2g} nats (layer {worst})"
        layers = ", ".join(map(str, self.significant)) or "none"
        return f"{ends}; layers that cost more than random labels' directions: {layers} (level {self.level:g} over all)"

    def draw(self, figure: Figure) -> None:
        """Draw the KL by layer with intervals, over the range of random labels."""
        axes = figure.add_subplot(xlabel="layer", ylabel="KL on controls (nats)", title="one layer ablated alone")
        places = list(range(len(self.kl)))
        low, high = self.random.clamp(min=NEGLIGIBLE_KL).aminmax(dim=1)
        axes.fill_between(places, low.tolist(), high.tolist(), color=GREY, alpha=0.5, label="random labels")
        values = [max(s.value, NEGLIGIBLE_KL) for s in self.kl]
        bars = [[max(v - s.low, 0) for v, s in zip(values, self.kl, strict=True)]]
        bars += [[max(s.high - v, 0) for v, s in zip(values, self.kl, strict=True)]]
        axes.errorbar(places, values, yerr=bars, fmt="o-", color=BLUE, label="the layer's directions")
        significant = self.significant
        axes.plot(significant, [values[i] for i in significant], "o", color=ORANGE, label="more than random")
        axes.set_yscale("log")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3)


def _cost(options: Mapping[str, Any]) -> Cost:
    each = prompt_count("search", "control", options["prompts"])
    return Cost(each * (constant(1) + variable("L") * (1 + options["random"])))


@analyses.register("entanglement", cite="arXiv:2406.11717", needs=("rows",), cost=_cost)
def measure_entanglement(
    context: AnalysisContext,
    *,
    prompts: Annotated[int, Field(ge=2)] = 8,
    random: Annotated[int, Field(ge=19, le=1000)] = RANDOM,
    level: Level = LEVEL,
    seed: int = 0,
) -> Entanglement:
    """Measure, for each layer, what control prompts lose when its writers lose the layer's directions.

    Live edits change one layer at a time, and the blocks below it are not run again. KL is compared with that of
    removing differences of means under ``random`` labelings (`draw_chance_directions`), each layer's in units of its
    mean. p is the share of all labelings, the true one counted, with as large a ratio at any layer: where labels mean
    nothing, any layer is found in at most a share ``level`` of cases.

    prompts: the most control prompts of the search split. Needs rows, and four prompts of each group.
    """
    sample = read_sample(context.activations, "entanglement", least=4)
    subject, control = context.subject, context.held_out["control"]
    ids = render_prompts(subject, pick_evenly(control, prompts))
    cached = CachedPrompts(subject, ids, budget=CACHE_BYTES, answers=())
    base, rows = cached.first_token(), []
    with progress("ANALYZE entanglement", subject.n_layers) as advance, report_to(SILENT):
        for layer in range(subject.n_layers):
            plans = _make_plans(context, sample, layer, random, seed)
            rows.append(_measure_kl(cached, base, plans) if plans else torch.zeros(1 + random, len(base)))
            advance(1)
    table = torch.stack(rows)
    own, means = tuple(mean_score(values, "nats") for values in table[:, 0]), table.mean(2)
    return Entanglement(own, means[:, 1:], *compare_with_random_labels(means), level)


def _make_plans(context: AnalysisContext, sample: Sample, layer: int, random: int, seed: int) -> list[Plan]:
    """Return plans that remove the layer's directions, then random labels', from the layer's writers alone."""
    subject, rows = context.subject, context.directions.basis[layer + 1]
    rows = rows[rows.any(1)]
    if not len(rows):
        return []
    draws = draw_chance_subspaces(sample, layer + 1, len(rows), random, seed + layer)
    return [remove_from_writers(subject, basis, (layer,)) for basis in (rows, *draws)]


def _measure_kl(
    cached: CachedPrompts, base: Float[Tensor, "prompts vocabulary"], plans: list[Plan]
) -> Float[Tensor, "plans prompts"]:
    """Return KL(base ‖ plan) of every prompt under every plan; all plans share the same passes."""
    plan_of_row = [plan for plan in range(len(plans)) for _ in range(len(base))]
    with applied_per_row(cached.subject, plans, plan_of_row):
        logp = cached.repeat(len(plans)).first_token()
    return torch.stack([kl_divergence(base, part) for part in logp.split(len(base))])


def compare_with_random_labels(
    means: Float[Tensor, "layers draws"],
) -> tuple[Float[Tensor, " layers"], Float[Tensor, " layers"]]:
    """Return `Entanglement.ratio` and `Entanglement.p` from mean KLs.

    means: the layer's own first, then those of random labels; all zero for a layer without directions. For p each
    layer's KLs are divided by the mean of all, the own one counted, so that no labeling is treated unlike another.
    """
    present, values = means.any(1), means.double().clamp(min=NEGLIGIBLE_KL)
    ratio = torch.where(present, values[:, 0] / values[:, 1:].mean(1), 0.0)
    relative = torch.where(present[:, None], values / values.mean(1, keepdim=True), 0.0)
    return ratio.float(), torch.where(present, compute_single_step_p_values(relative.T), 1.0)
