"""Activation patching: which component, at which token, carries what makes the answers to two prompts differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from obliteratus.analyze.base import GROUPS, AnalysisContext, analyses, choose_direction, subsample
from obliteratus.analyze.patch_values import Patch, run_patched
from obliteratus.analyze.readout import compute_next_token_log_probs
from obliteratus.analyze.samples import LEVEL
from obliteratus.analyze.significance import Contrast, contrast_within_pairs, describe_clearest
from obliteratus.analyze.writers import attention_outputs, block_output_modules
from obliteratus.core.cost import Cost, constant, prompt_count, variable
from obliteratus.core.probing import ProbeRequest
from obliteratus.core.results import Score
from obliteratus.core.shapes import Float, Int
from obliteratus.core.types import Subject
from obliteratus.inference.chat_template import Ids, render_prompts
from obliteratus.inference.hidden_states import read_hidden_states
from obliteratus.report.curves import Figure
from obliteratus.verify.intervals import mean_score

KINDS = ("attention", "mlp", "block")
PatchScore = Literal["logits", "projection"]


@dataclass(frozen=True)
class PatchLocation:
    """The activation that is replaced."""

    kind: str
    """``attention``, ``mlp``: what it adds to the stream; ``block``: the stream after it; ``head``: one head."""
    layer: int
    position: int
    """Token, counted from the end."""
    head: int = -1

    def __str__(self) -> str:
        head = f" head {self.head}" if self.kind == "head" else ""
        kind = "attention" if self.kind == "head" else self.kind
        return f"{kind} {self.layer}{head} at {self.position}"


# ------------------------------------------------------------------------------------------------- the result
@dataclass(frozen=True)
class Patching:
    """How far the score of one prompt moves towards the other's when one of the other's activations is patched in."""

    gap: Score
    """Score of the patched prompt − score of the other, mean over pairs: the effect of replacing everything."""
    apart: bool
    """Whether the gap differs from zero beyond chance."""
    unit: str
    """``nats`` or ``stream``."""
    places: tuple[PatchLocation, ...]
    effects: Contrast
    """Mean effect over pairs at each of ``places``; positive is towards the other prompt."""
    heads: tuple[PatchLocation, ...]
    """The heads of the attention outputs that move the score most, in whichever direction."""
    head_effects: Contrast
    """Mean effect over pairs of each of ``heads``. The limit is that of places and heads together."""
    untried: str = ""
    """Why no head was tried; empty where some were."""

    def share(self, effects: Contrast) -> Float[Tensor, " n"]:
        """Return the effects as shares of the gap; zero where there is no gap beyond chance."""
        return effects.value / self.gap.value if self.apart else torch.zeros_like(effects.value)

    def to_dict(self) -> dict[str, Any]:
        """Return every place with its effect, standard error and share, and the names of those beyond chance."""
        found = [str(self.places[i]) for i in self.effects.significant]
        heads = [str(self.heads[i]) for i in self.head_effects.significant]
        tables = {
            "places": self._tabulate(self.places, self.effects),
            "heads": self._tabulate(self.heads, self.head_effects),
        }
        about = {"gap": self.gap.model_dump(), "unit": self.unit, "level": LEVEL, "limit": self.effects.limit}
        return {**about, "found": found, "found_heads": heads, "untried": self.untried, **tables}

    def _tabulate(self, places: Sequence[PatchLocation], effects: Contrast) -> list[dict[str, Any]]:
        values = zip(places, effects.value.tolist(), effects.error.tolist(), self.share(effects).tolist(), strict=True)
        return [{**vars(place), "effect": v, "error": e, "share": s} for place, v, e, s in values]

    def summary(self) -> str:
        """Return the places and heads with the clearest effects."""
        places = describe_clearest(self.effects, lambda i: str(self.places[i]))
        heads = self.untried or describe_clearest(self.head_effects, lambda i: str(self.heads[i]))
        tested = f"level {LEVEL:g} over all {len(self.places) + len(self.heads)} places"
        return f"of a gap of {self.gap.value:.3g} {self.unit}: {places}; heads: {heads} ({self.gap.n} pairs, {tested})"

    def draw(self, figure: Figure) -> None:
        """Draw one map for each kind of component: layers across, tokens down, shares of the gap as colors."""
        shares = self.share(self.effects)
        most = max(float(shares.abs().max()), torch.finfo(torch.float32).tiny)
        image: Any = None
        for i, kind in enumerate(KINDS):
            label = "layer" if kind == KINDS[-1] else ""
            axes = figure.add_subplot(len(KINDS), 1, i + 1, xlabel=label, ylabel="token", title=kind)
            table = _make_grid([(p, s) for p, s in zip(self.places, shares.tolist(), strict=True) if p.kind == kind])
            size = (-0.5, table.shape[1] - 0.5, -len(table) - 0.5, -0.5)
            image = axes.imshow(table.numpy(), cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto", extent=size)
            axes.set_yticks(range(-len(table), 0))
        figure.colorbar(image, ax=figure.axes, label="share of the gap")


def _make_grid(values: Sequence[tuple[PatchLocation, float]]) -> Float[Tensor, "positions layers"]:
    """Return the values as an image whose first row is the last token."""
    table = torch.full((max(-p.position for p, _ in values), 1 + max(p.layer for p, _ in values)), torch.nan)
    for place, value in values:
        table[-place.position - 1, place.layer] = value
    return table


# ----------------------------------------------------------------------------------------------- the analysis
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
    """Measure what each component's output at each token contributes to the answer, by activation patching.

    The i-th target prompt is paired with the i-th control prompt of the search split. Outputs recorded on one prompt
    replace those of the other, one component and token at a time. Tokens are counted from the end, so lengths may
    differ. The limit comes from sign flips of pairs, which needs at least six pairs: where no patch moves the score
    more often one way than the other, anything is found among all places and heads in at most 5 % of cases. With
    ``logits`` that is a statement about the two answers of each pair, whatever groups they come from.

    score: ``logits``, the log-odds between the model's first choices for the two prompts, or ``projection`` of the
    last stream on its direction. into: the group that is patched. positions: how many of the last tokens, at most as
    many as the shortest prompt has. heads: the most heads, tried at every token: all heads of as many attention outputs
    as this allows, those first that move the score most in either direction.
    """
    setup = PatchingSetup.record(context, score, into, pairs, positions)
    subject = context.subject
    places = tuple(
        PatchLocation(kind, layer, -p)
        for layer in range(subject.n_layers)
        for kind in KINDS
        if kind == "block" or block_output_modules(subject, layer)[kind]
        for p in range(1, setup.positions + 1)
    )
    effects = setup.measure_effects(places)
    head_places = setup.list_heads(rank_layers(places, effects), heads)
    head_effects = setup.measure_effects(head_places) if head_places else torch.zeros(len(effects), 0)
    contrast = contrast_within_pairs(torch.cat([effects, head_effects], 1), seed)
    untried = "" if head_places else setup.explain_untried(heads)
    first, others = contrast.split(len(places))
    apart = bool(contrast_within_pairs(setup.gaps[:, None], seed).significant)
    return Patching(setup.gap, apart, setup.unit, places, first, head_places, others, untried)


def rank_layers(places: Sequence[PatchLocation], effects: Float[Tensor, "pairs places"]) -> list[int]:
    """Return the layers by how far patches of their attention move the score (root mean square over pairs).

    The largest comes first. The sign does not count: the heads tested would otherwise be those that chance let agree in
    sign, and the sign flips that give the limit would not see it.
    """
    sizes: dict[int, float] = {}
    for place, value in zip(places, effects.double().square().mean(0).sqrt().tolist(), strict=True):
        if place.kind == "attention":
            sizes[place.layer] = max(sizes.get(place.layer, 0.0), value)
    return sorted(sizes, key=lambda layer: -sizes[layer])


# -------------------------------------------------------------------------------------------------- measuring
@dataclass(frozen=True)
class PatchingSetup:
    """Pairs of prompts, the activations recorded on the source prompts, and the score that patches move."""

    subject: Subject
    ids: Ids
    """The prompts that are patched."""
    positions: int
    outputs: Mapping[str, Float[Tensor, "pairs positions width"]]
    """Outputs on the source prompts, by module; the last token is last."""
    inputs: Mapping[str, Float[Tensor, "pairs positions in"]]
    """Inputs of attention's output matrices on the source prompts, by module."""
    patched: Float[Tensor, "pairs width"]
    """The last stream of the prompts that are patched, before any patch."""
    source: Float[Tensor, "pairs width"]
    """The last stream of the source prompts."""
    along: Float[Tensor, " width"] | None
    """The direction of the score ``projection``; None for the score ``logits``."""

    @classmethod
    def record(
        cls, context: AnalysisContext, score: PatchScore, into: str, pairs: int, positions: int
    ) -> PatchingSetup:
        """Run both groups once and keep the source prompts' activations."""
        subject, prompts = context.subject, subsample(context.held_out, pairs)
        n = min(len(prompts[group]) for group in GROUPS)
        ids = {group: render_prompts(subject, prompts[group][:n]) for group in GROUPS}
        source = ids["control" if into == "target" else "target"]
        least = min(positions, *(len(row) for group in ids.values() for row in group))
        along = choose_direction(context, subject.n_layers, "patching").vector if score == "projection" else None
        outputs, inputs = _record_activations(subject, source, least)
        patched = run_patched(subject, ids[into], [()] * n, "ANALYZE patching")
        last = outputs[f"{subject.layers}.{subject.n_layers - 1}"][:, -1]
        return cls(subject, ids[into], least, outputs, inputs, patched, last, along)

    @property
    def unit(self) -> str:
        return "nats" if self.along is None else "stream"

    @property
    def gap(self) -> Score:
        """The mean of ``gaps``."""
        return mean_score(self.gaps, self.unit)

    @property
    def gaps(self) -> Float[Tensor, " pairs"]:
        """Score of the prompts to patch, before any patch, − score of the source prompts."""
        return self._score(self.patched) - self._score(self.source)

    def _score(self, streams: Float[Tensor, "pairs width"]) -> Float[Tensor, " pairs"]:
        if self.along is not None:
            return streams @ self.along
        one, two = self._first_choices
        logp, rows = compute_next_token_log_probs(self.subject, streams), torch.arange(len(streams))
        return logp[rows, one] - logp[rows, two]

    @cached_property
    def _first_choices(self) -> tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"]]:
        """The model's first choice of next token for the prompts to patch, and for the source prompts."""
        patched, source = (compute_next_token_log_probs(self.subject, x).argmax(1) for x in (self.patched, self.source))
        return patched, source

    def measure_effects(self, places: Sequence[PatchLocation]) -> Float[Tensor, "pairs places"]:
        """Return by how much a patch at each place moves each pair's score; all patches share the same passes."""
        n = len(self.ids)
        jobs = [(pair, place) for place in places for pair in range(n)]
        patches = [self._make_patches(pair, place) for pair, place in jobs]
        streams = run_patched(self.subject, [self.ids[pair] for pair, _ in jobs], patches, "ANALYZE patching")
        base = self._score(self.patched)
        return torch.stack([base - self._score(x) for x in streams.split(n)], 1)

    def _make_patches(self, pair: int, place: PatchLocation) -> list[Patch]:
        subject, p = self.subject, place.position
        if place.kind == "block":
            path = f"{subject.layers}.{place.layer}"
            return [Patch(path, p, self.outputs[path][pair, p])]
        if place.kind == "head":
            path, size = self._attention[place.layer]
            span = (place.head * size, (place.head + 1) * size)
            return [Patch(path, p, self.inputs[path][pair, p, slice(*span)], "input", span)]
        paths = block_output_modules(subject, place.layer)[place.kind]
        return [Patch(path, p, self.outputs[path][pair, p]) for path in paths]

    def list_heads(self, layers: Sequence[int], most: int) -> tuple[PatchLocation, ...]:
        """Return all heads of these layers at every position: whole layers, in order, at most ``most`` heads."""
        n = self._heads_per_layer
        chosen = [layer for layer in layers if layer in self._attention][: most // n]
        return tuple(
            PatchLocation("head", j, -p, h) for j in chosen for h in range(n) for p in range(1, self.positions + 1)
        )

    def explain_untried(self, most: int) -> str:
        """Return why a budget of ``most`` heads tries none."""
        if not self._attention:
            return "no head was tried (no block has attention with heads of equal size)"
        n = self._heads_per_layer
        return f"no head was tried ({n} heads in a block, budget {most}; give heads={n} or more)"

    @property
    def _heads_per_layer(self) -> int:
        return int(self.subject.model.config.get_text_config().num_attention_heads)

    @cached_property
    def _attention(self) -> dict[int, tuple[str, int]]:
        """Layer → path of attention's output matrix, and the size of a head."""
        return {site.layer: (site.path, size) for site, size in attention_outputs(self.subject)}


def _record_activations(subject: Subject, ids: Ids, positions: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return outputs of writers and blocks, and inputs of attention output matrices, by module path."""
    added = (paths for layer in range(subject.n_layers) for paths in block_output_modules(subject, layer).values())
    output_paths = list(dict.fromkeys(path for paths in added for path in paths))
    input_paths = [site.path for site, _ in attention_outputs(subject)]
    blocks = [f"{subject.layers}.{layer}" for layer in range(subject.n_layers)]
    outputs: dict[str, list[Tensor]] = {path: [torch.empty(0)] * len(ids) for path in [*output_paths, *blocks]}
    inputs: dict[str, list[Tensor]] = {path: [torch.empty(0)] * len(ids) for path in input_paths}
    tokens, request = range(-positions, 0), ProbeRequest(output_paths, input_paths)
    for batch in read_hidden_states(subject, ids, position=tokens, request=request, title="ANALYZE patching"):
        values = torch.cat([batch.outputs, batch.stream[:, 1:]], 1)
        for j, row in enumerate(batch.rows):
            for path, value in zip(outputs, values[j], strict=True):
                outputs[path][row] = value
            for path in input_paths:
                inputs[path][row] = batch.inputs[path][j]
    return {p: torch.stack(x) for p, x in outputs.items()}, {p: torch.stack(x) for p, x in inputs.items()}
