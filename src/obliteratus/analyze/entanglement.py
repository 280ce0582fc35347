"""What removing each layer's directions does to prompts that it should leave alone: measured, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from obliteratus.analyze.base import AnalysisContext, analyses
from obliteratus.analyze.significance import compute_ratio_limit, draw_subspace, estimate_degrees_of_freedom
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
from obliteratus.prompts import evenly_spaced
from obliteratus.report.curves import BLUE, GREY, ORANGE
from obliteratus.verify.intervals import bootstrap, mean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# A KL of so many nats is rounding: logarithms begin there.
NOTHING = 1e-6
# Bytes of what the blocks below each edit gave, kept for the next layers: 32 short prompts of a small model take 10 MB.
CACHE_BYTES = 50e6


@dataclass(frozen=True)
class Entanglement:
    """KL(as it is ‖ ablated) of the first token on control prompts, in nats, with one layer's writers edited alone."""

    kl: tuple[Score, ...]
    """Of each layer's own directions; zero where it has none."""
    random: Float[Tensor, "layers draws"]
    """The mean KL of random directions in their place, as many to a layer as it has."""
    ratio: Float[Tensor, " layers"]
    """KL of the layer's own to the mean KL of random ones; 0 where it has none."""
    limit: float
    """What the largest ratio reaches in one of twenty models whose directions are random."""

    @property
    def significant(self) -> list[int]:
        """Layers that controls lean on along the directions more than along random ones."""
        return [i for i, value in enumerate(self.ratio.tolist()) if value > self.limit]

    def to_dict(self) -> dict[str, Any]:
        """Every layer's KL with its interval, beside those of random directions."""
        values = {"kl": [s.model_dump() for s in self.kl], "random": self.random.tolist()}
        return {**values, "ratio": self.ratio.tolist(), "limit": self.limit, "found": self.significant}

    def summary(self) -> str:
        """The layer that costs most, and the one that costs least."""
        values = [s.value for s in self.kl]
        worst, best = values.index(max(values)), values.index(min(values))
        ends = f"KL on controls {values[best]:.2g} (layer {best}) to {values[worst]:.2g} nats (layer {worst})"
        layers = ", ".join(map(str, self.significant)) or "none"
        return f"{ends}; layers where it is more than random directions cost: {layers}"

    def draw(self, figure: Figure) -> None:
        """KL by layer with intervals, over the range of random directions."""
        axes = figure.add_subplot(xlabel="layer", ylabel="KL on controls (nats)", title="one layer ablated alone")
        places = list(range(len(self.kl)))
        low, high = self.random.clamp(min=NOTHING).aminmax(dim=1)
        axes.fill_between(places, low.tolist(), high.tolist(), color=GREY, alpha=0.5, label="random directions")
        values = [max(s.value, NOTHING) for s in self.kl]
        bars = [[max(v - s.low, 0) for v, s in zip(values, self.kl, strict=True)]]
        bars += [[max(s.high - v, 0) for v, s in zip(values, self.kl, strict=True)]]
        axes.errorbar(places, values, yerr=bars, fmt="o-", color=BLUE, label="the layer's directions")
        axes.plot(self.significant, [values[i] for i in self.significant], "o", color=ORANGE, label="more than random")
        axes.set_yscale("log")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3)


def _cost(options: Mapping[str, Any]) -> Cost:
    each = prompt_count("search", "control", options["prompts"])
    return Cost(each * (constant(1) + variable("L") * (1 + options["random"])))


@analyses.register("entanglement", cite="arXiv:2406.11717", cost=_cost)
def measure_entanglement(
    context: AnalysisContext,
    *,
    prompts: Annotated[int, Field(ge=2)] = 16,
    random: Annotated[int, Field(ge=2, le=100)] = 4,
    seed: int = 0,
) -> Entanglement:
    """What it does to control prompts when one layer's writers lose that layer's directions, for each layer.

    Live edits of one layer at a time; the blocks below it are not run again. A layer counts where its KL lies above
    that of random directions, by a ratio that chance would bring to none of the layers in 19 of 20 cases. prompts:
    control prompts of the search split, at most. random: random subspaces tried at each layer; with fewer than some
    twenty over all layers the limit is rough.
    """
    subject, held = context.subject, context.held_out["control"]
    ids = render_prompts(subject, [held[i] for i in evenly_spaced(len(held), prompts)])
    trunk = CachedPrompts(subject, ids, budget=CACHE_BYTES, answers=())
    base, rows = trunk.first_token(), []
    with progress("ANALYZE entanglement", subject.n_layers) as advance, report_to(SILENT):
        for layer in range(subject.n_layers):
            plans = _plans(context, layer, random, seed)
            rows.append(_divergences(trunk, base, plans) if plans else torch.zeros(1 + random, len(base)))
            advance(1)
    table = torch.stack(rows)
    own = tuple(bootstrap(values, mean, "nats") for values in table[:, 0])
    return Entanglement(own, table[:, 1:].mean(2), *compute_entanglement_ratio(table.mean(2)))


def _plans(context: AnalysisContext, layer: int, random: int, seed: int) -> list[Plan]:
    """The layer's directions off, then random ones off, by its writers alone."""
    subject, rows = context.subject, context.directions.basis[layer + 1]
    rows = rows[rows.any(1)]
    if not len(rows):
        return []
    draws = [draw_subspace(len(rows), subject.width, seed + layer * random + i) for i in range(random)]
    return [remove_from_writers(subject, basis, (layer,)) for basis in (rows, *draws)]


def _divergences(
    trunk: CachedPrompts, base: Float[Tensor, "prompts vocabulary"], plans: list[Plan]
) -> Float[Tensor, "plans prompts"]:
    """KL(base ‖ plan) of every prompt under every plan, all of them in the same passes."""
    of_row = [plan for plan in range(len(plans)) for _ in range(len(base))]
    with applied_per_row(trunk.subject, plans, of_row):
        logp = trunk.times(len(plans)).first_token()
    return torch.stack([kl_divergence(base, part) for part in logp.split(len(base))])


def compute_entanglement_ratio(means: Float[Tensor, "layers plans"]) -> tuple[Float[Tensor, " layers"], float]:
    """`Entanglement.ratio` and its limit. means: the layer's own first; a layer without directions is all zero.

    A small change costs a quadratic form in its direction, which for random ones is about χ²-distributed; with how
    many degrees of freedom, the spread of its logarithms within layers says.
    """
    means = means.double()
    there, drawn = means.any(1), means[:, 1:].clamp(min=NOTHING)
    n, draws = int(there.sum()), drawn.shape[1]
    if not n:
        return torch.zeros(len(means)), torch.inf
    freedom = estimate_degrees_of_freedom(float(drawn[there].log().var(1).mean()))
    return (means[:, 0] / drawn.mean(1)).float(), compute_ratio_limit(n, draws, freedom)
