"""Activation patching: which component, at which token, carries what makes the answers to two prompts differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from obliteratus.analyze.base import AnalysisContext, analyses
from obliteratus.analyze.significance import Contrast, contrast_within_pairs, describe_clearest
from obliteratus.analyze.writers import block_output_modules
from obliteratus.core.cost import Cost, constant, prompt_count, variable
from obliteratus.core.results import Score
from obliteratus.core.shapes import Float

if TYPE_CHECKING:
    from matplotlib.figure import Figure


from obliteratus.analyze.base import GROUPS, choose_direction, subsample
from obliteratus.analyze.patch_values import Patch, run_patched
from obliteratus.analyze.readout import compute_next_token_log_probs
from obliteratus.analyze.writers import is_mixer, writers_in_order
from obliteratus.core.types import ProbeRequest, Subject
from obliteratus.inference.chat_template import Ids, render_prompts
from obliteratus.inference.hidden_states import read_hidden_states
from obliteratus.summon.sites import find_architecture, has_heads
from obliteratus.verify.intervals import bootstrap, mean
from obliteratus.weights.matrices import count_inputs

PatchScore = Literal["logits", "projection"]


@dataclass(frozen=True)
class PatchLocation:
    """What is replaced."""

    kind: str
    """``attention``, ``mlp``: what it adds to the stream; ``block``: the stream behind it; ``head``: a head's part."""
    layer: int
    position: int
    """Token, counted from the end."""
    head: int = -1

    def __str__(self) -> str:
        head = f" head {self.head}" if self.kind == "head" else ""
        kind = "attention" if self.kind == "head" else self.kind
        return f"{kind} {self.layer}{head} at {self.position}"


@dataclass(frozen=True)
class PatchingSetup:
    """Pairs of prompts, what the ones give to be put into the others, and the score."""

    subject: Subject
    ids: Ids
    """Of the prompts that are patched."""
    positions: int
    outputs: Mapping[str, Float[Tensor, "pairs positions width"]]
    """Of the other prompts, by module; the last token last."""
    inputs: Mapping[str, Float[Tensor, "pairs positions in"]]
    first: Float[Tensor, "pairs width"]
    """The last stream of the prompts that are patched, as they are."""
    other: Float[Tensor, "pairs width"]
    """And of the others."""
    along: Float[Tensor, " width"] | None
    """The direction of the score ``projection``."""

    @classmethod
    def of(cls, context: AnalysisContext, score: PatchScore, into: str, pairs: int, positions: int) -> PatchingSetup:
        """Runs both groups once."""
        subject, prompts = context.subject, subsample(context.held_out, pairs)
        n = min(len(prompts[group]) for group in GROUPS)
        rows = {group: render_prompts(subject, prompts[group][:n]) for group in GROUPS}
        other = rows["control" if into == "target" else "target"]
        least = min(positions, *(len(row) for group in rows.values() for row in group))
        along = choose_direction(context, subject.n_layers, "patching").vector if score == "projection" else None
        outputs, inputs = _given(subject, other, least)
        first = run_patched(subject, rows[into], [()] * n, "ANALYZE patching")
        last = outputs[f"{subject.layers}.{subject.n_layers - 1}"][:, -1]
        return cls(subject, rows[into], least, outputs, inputs, first, last, along)

    @property
    def unit(self) -> str:
        return "nats" if self.along is None else "stream"

    @property
    def gap(self) -> Score:
        """score(patched, as it is) − score(other)."""
        pairs = list(range(len(self.ids)))
        return bootstrap(self._score(self.first, pairs) - self._score(self.other, pairs), mean, self.unit)

    def _score(self, streams: Float[Tensor, "rows width"], pairs: Sequence[int]) -> Float[Tensor, " rows"]:
        """pairs: of each row."""
        if self.along is not None:
            return streams @ self.along
        one, two = (
            compute_next_token_log_probs(self.subject, x).argmax(1)[list(pairs)] for x in (self.first, self.other)
        )
        logp, rows = compute_next_token_log_probs(self.subject, streams), torch.arange(len(streams))
        return logp[rows, one] - logp[rows, two]

    def effects(self, places: Sequence[PatchLocation]) -> Float[Tensor, "pairs places"]:
        """By how much each place moves each pair's score: all of them rows of the same passes."""
        n = len(self.ids)
        jobs = [(pair, place) for place in places for pair in range(n)]
        puts = [self._puts(pair, place) for pair, place in jobs]
        streams = run_patched(self.subject, [self.ids[pair] for pair, _ in jobs], puts, "ANALYZE patching")
        base = self._score(self.first, range(n))
        parts = [self._score(x, range(n)) for x in streams.split(n)]
        return torch.stack([base - part for part in parts], 1)

    def _puts(self, pair: int, place: PatchLocation) -> list[Patch]:
        subject, p = self.subject, place.position
        if place.kind == "block":
            path = f"{subject.layers}.{place.layer}"
            return [Patch(path, p, self.outputs[path][pair, p])]
        if place.kind == "head":
            path, size = _attention(subject)[place.layer]
            span = (place.head * size, (place.head + 1) * size)
            return [Patch(path, p, self.inputs[path][pair, p, slice(*span)], "input", span)]
        paths = block_output_modules(subject, place.layer)[place.kind]
        return [Patch(path, p, self.outputs[path][pair, p]) for path in paths]

    def heads(self, layers: Sequence[int], most: int) -> tuple[PatchLocation, ...]:
        """Heads of these layers in their order, whole layers, no more than so many."""
        known = _attention(self.subject)
        n = int(self.subject.model.config.get_text_config().num_attention_heads)
        chosen = [layer for layer in layers if layer in known][: most // n]
        return tuple(
            PatchLocation("head", j, -p, h) for j in chosen for h in range(n) for p in range(1, self.positions + 1)
        )


def _attention(subject: Subject) -> dict[int, tuple[str, int]]:
    """Layer → path of attention's output matrix and the size of a head; only where heads share its inputs evenly."""
    family, n = find_architecture(subject.model.config), int(subject.model.config.get_text_config().num_attention_heads)
    sites = [site for site in writers_in_order(subject) if is_mixer(site) and has_heads(family, site)]
    wide = {site: count_inputs(subject.module(site.path), site) for site in sites}
    return {site.layer: (site.path, size // n) for site, size in wide.items() if size % n == 0}


def _given(subject: Subject, ids: Ids, positions: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs of all that is added to the stream, of the blocks, and inputs of attention's output matrices."""
    added = (paths for layer in range(subject.n_layers) for paths in block_output_modules(subject, layer).values())
    outputs = list(dict.fromkeys(path for paths in added for path in paths))
    inputs = [path for path, _ in _attention(subject).values()]
    blocks = [f"{subject.layers}.{layer}" for layer in range(subject.n_layers)]
    store: dict[str, list[Tensor]] = {path: [torch.empty(0)] * len(ids) for path in [*outputs, *blocks]}
    fed: dict[str, list[Tensor]] = {path: [torch.empty(0)] * len(ids) for path in inputs}
    places, request = range(-positions, 0), ProbeRequest(outputs, inputs)
    for got in read_hidden_states(subject, ids, position=places, request=request, title="ANALYZE patching"):
        values = torch.cat([got.outputs, got.stream[:, 1:]], 1)
        for j, row in enumerate(got.rows):
            for path, value in zip(store, values[j], strict=True):
                store[path][row] = value
            for path in inputs:
                fed[path][row] = got.inputs[path][j]
    return {p: torch.stack(x) for p, x in store.items()}, {p: torch.stack(x) for p, x in fed.items()}


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

    def to_dict(self) -> dict[str, Any]:
        """Every place with its effect, standard error and share, and by name those beyond chance."""
        found = [str(self.places[i]) for i in self.effects.significant]
        heads = [str(self.heads[i]) for i in self.head_effects.significant]
        tables = {"places": self._table(self.places, self.effects), "heads": self._table(self.heads, self.head_effects)}
        return {"gap": self.gap.model_dump(), "unit": self.unit, "found": found, "found_heads": heads, **tables}

    def _table(self, places: Sequence[PatchLocation], effects: Contrast) -> list[dict[str, Any]]:
        values = zip(places, effects.value.tolist(), effects.error.tolist(), self.share(effects).tolist(), strict=True)
        return [{**vars(place), "effect": v, "error": e, "share": s} for place, v, e, s in values]

    def summary(self) -> str:
        """The places that carry most."""
        places = describe_clearest(self.effects, lambda i: str(self.places[i]))
        heads = describe_clearest(self.head_effects, lambda i: str(self.heads[i]))
        return f"of a gap of {self.gap.value:.3g} {self.unit}: {places}; heads: {heads}"

    def draw(self, figure: Figure) -> None:
        """One map for each kind of component: layers across, tokens down, shares of the gap as colors."""
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
    places = variable("L") * (len(KINDS) * options["positions"]) + constant(options["heads"] * options["positions"])
    return Cost((places + constant(2)) * prompt_count("search", "target", options["pairs"]))


@analyses.register("patching", cite="arXiv:2202.05262", cost=_cost)
def patch_activations(
    context: AnalysisContext,
    *,
    score: PatchScore = "logits",
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
    setting = PatchingSetup.of(context, score, into, pairs, positions)
    places = tuple(
        PatchLocation(kind, layer, -p)
        for layer in range(context.subject.n_layers)
        for kind in KINDS
        if kind == "block" or block_output_modules(context.subject, layer)[kind]
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
