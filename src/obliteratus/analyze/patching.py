"""Activation patching: which component, at which token, carries what makes the answers to two prompts differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from obliteratus.analyze.along import block_output_modules
from obliteratus.analyze.base import AnalysisContext, analyses
from obliteratus.analyze.chance import Contrast, contrast_within_pairs, describe_clearest
from obliteratus.analyze.pairs import PatchingSetup, PatchLocation, What
from obliteratus.core.cost import Cost, amount, n_of, number
from obliteratus.core.results import Score
from obliteratus.core.shapes import Float

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = ("attention", "mlp", "block")


@dataclass(frozen=True)
class Patching:
    """How far the score moves from one prompt's to the other's when one activation of the other is put in."""

    gap: Score
    """The whole way, mean over pairs: score of the prompt that is patched − score of the other."""
    unit: str
    """``nats`` or ``stream``."""
    places: tuple[PatchLocation, ...]
    effects: Contrast
    """Of ``places``, mean over pairs; positive is towards the other prompt. The whole way is ``gap``."""
    heads: tuple[PatchLocation, ...]
    """The heads of the attention outputs with the largest effects."""
    head_effects: Contrast

    def share(self, effects: Contrast) -> Float[Tensor, " n"]:
        """Effects in units of the gap; zero where the gap's interval holds zero."""
        known = self.gap.low > 0 or self.gap.high < 0
        return effects.value / self.gap.value if known else torch.zeros_like(effects.value)

    def numbers(self) -> dict[str, Any]:
        """Every place with its effect, standard error and share, and by name those beyond chance."""
        found = [str(self.places[i]) for i in self.effects.found]
        heads = [str(self.heads[i]) for i in self.head_effects.found]
        tables = {"places": self._table(self.places, self.effects), "heads": self._table(self.heads, self.head_effects)}
        return {"gap": self.gap.model_dump(), "unit": self.unit, "found": found, "found_heads": heads, **tables}

    def _table(self, places: Sequence[PatchLocation], effects: Contrast) -> list[dict[str, Any]]:
        values = zip(places, effects.value.tolist(), effects.error.tolist(), self.share(effects).tolist(), strict=True)
        return [{**vars(place), "effect": v, "error": e, "share": s} for place, v, e, s in values]

    def told(self) -> str:
        """The places that carry most."""
        places = describe_clearest(self.effects, lambda i: str(self.places[i]))
        heads = describe_clearest(self.head_effects, lambda i: str(self.heads[i]))
        return f"of a gap of {self.gap.value:.3g} {self.unit}: {places}; heads: {heads}"

    def draw(self, figure: Figure) -> None:
        """One map for each kind of component: layers across, tokens down, shares of the gap as colours."""
        shares = self.share(self.effects)
        most = max(float(shares.abs().max()), torch.finfo(torch.float32).tiny)
        image: Any = None
        for i, kind in enumerate(KINDS):
            label = "layer" if kind == KINDS[-1] else ""
            axes = figure.add_subplot(len(KINDS), 1, i + 1, xlabel=label, ylabel="token", title=kind)
            table = _grid([(p, s) for p, s in zip(self.places, shares.tolist(), strict=True) if p.kind == kind])
            size = (-0.5, table.shape[1] - 0.5, -len(table) - 0.5, -0.5)
            image = axes.imshow(table.numpy(), cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto", extent=size)
            axes.set_yticks(range(-len(table), 0))
        figure.colorbar(image, ax=figure.axes, label="share of the gap")


def _grid(values: Sequence[tuple[PatchLocation, float]]) -> Float[Tensor, "positions layers"]:
    """The last token first, as an image's rows run from its top."""
    table = torch.full((max(-p.position for p, _ in values), 1 + max(p.layer for p, _ in values)), torch.nan)
    for place, value in values:
        table[-place.position - 1, place.layer] = value
    return table


def _cost(options: Mapping[str, Any]) -> Cost:
    places = amount("L") * (len(KINDS) * options["positions"]) + number(options["heads"] * options["positions"])
    return Cost((places + number(2)) * n_of("search", "target", options["pairs"]))


@analyses.register("patching", cite="arXiv:2202.05262", cost=_cost)
def patching(
    ground: AnalysisContext,
    *,
    score: What = "logits",
    into: Literal["target", "control"] = "target",
    pairs: Annotated[int, Field(ge=1, le=1000)] = 8,
    positions: Annotated[int, Field(ge=1, le=64)] = 3,
    heads: Annotated[int, Field(ge=0)] = 32,
    seed: int = 0,
) -> Patching:
    """What an answer hangs on: each component's output at each token, put in from a prompt of the other group.

    The i-th target prompt is paired with the i-th control prompt of the search split; tokens are counted from the end,
    so that lengths may differ. score: "logits", the log-odds of the model's first choice for the one prompt over that
    for the other; or "projection" of the last stream on its direction. into: the group that is patched. positions:
    last tokens, at most as many as the shortest prompt has. heads: at most so many are tried, at every token: those
    of the attention outputs with the largest effects. Effects are told from chance by flipping the signs of pairs,
    which takes six pairs or more.
    """
    setting = PatchingSetup.of(ground, score, into, pairs, positions)
    places = tuple(
        PatchLocation(kind, layer, -p)
        for layer in range(ground.lab.subject.n_layers)
        for kind in KINDS
        if kind == "block" or block_output_modules(ground.lab.subject, layer)[kind]
        for p in range(1, setting.positions + 1)
    )
    moved = setting.effects(places)
    chosen = setting.heads(_by_layer(places, moved), heads)
    effects = setting.effects(chosen) if chosen else torch.zeros(len(moved), 0)
    return Patching(
        setting.gap,
        setting.unit,
        places,
        contrast_within_pairs(moved, seed),
        chosen,
        contrast_within_pairs(effects, seed),
    )


def _by_layer(places: Sequence[PatchLocation], moved: Float[Tensor, "pairs places"]) -> list[int]:
    """Layers by what their attention moves, the most first."""
    sizes: dict[int, float] = {}
    for place, value in zip(places, moved.mean(0).tolist(), strict=True):
        if place.kind == "attention":
            sizes[place.layer] = max(sizes.get(place.layer, 0.0), abs(value))
    return sorted(sizes, key=lambda layer: -sizes[layer])
