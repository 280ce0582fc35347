"""Pairs of prompts, what the one gives to be put into the other, and the score that this moves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from obliteratus.analyze.along import (
    GROUPS,
    block_output_modules,
    choose_direction,
    is_mixer,
    subsample,
    writers_in_order,
)
from obliteratus.analyze.base import AnalysisContext
from obliteratus.analyze.putting import Patch, patched_last_streams
from obliteratus.analyze.readout import next_token_log_probs
from obliteratus.core.results import Score
from obliteratus.core.shapes import Float
from obliteratus.core.types import Subject
from obliteratus.inference.chat_template import Ids, render_prompts
from obliteratus.inference.hidden_states import read_hidden_states
from obliteratus.inference.hooks import ModulesToRead
from obliteratus.summon.sites import architecture_of, has_heads
from obliteratus.verify.intervals import bootstrap, mean
from obliteratus.weights.matrices import count_inputs

What = Literal["logits", "projection"]


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
    def of(cls, ground: AnalysisContext, score: What, into: str, pairs: int, positions: int) -> PatchingSetup:
        """Runs both groups once."""
        subject, prompts = ground.lab.subject, subsample(ground.held, pairs)
        n = min(len(prompts[group]) for group in GROUPS)
        rows = {group: render_prompts(subject, prompts[group][:n]) for group in GROUPS}
        other = rows["control" if into == "target" else "target"]
        least = min(positions, *(len(row) for group in rows.values() for row in group))
        along = choose_direction(ground, subject.n_layers, "patching").vector if score == "projection" else None
        outputs, inputs = _given(subject, other, least)
        first = patched_last_streams(subject, rows[into], [()] * n, "ANALYZE patching")
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
        one, two = (next_token_log_probs(self.subject, x).argmax(1)[list(pairs)] for x in (self.first, self.other))
        logp, rows = next_token_log_probs(self.subject, streams), torch.arange(len(streams))
        return logp[rows, one] - logp[rows, two]

    def effects(self, places: Sequence[PatchLocation]) -> Float[Tensor, "pairs places"]:
        """By how much each place moves each pair's score: all of them rows of the same passes."""
        n = len(self.ids)
        jobs = [(pair, place) for place in places for pair in range(n)]
        puts = [self._puts(pair, place) for pair, place in jobs]
        streams = patched_last_streams(self.subject, [self.ids[pair] for pair, _ in jobs], puts, "ANALYZE patching")
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
    family, n = architecture_of(subject.model.config), int(subject.model.config.get_text_config().num_attention_heads)
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
    places, taps = range(-positions, 0), ModulesToRead(outputs, inputs)
    for got in read_hidden_states(subject, ids, position=places, taps=taps, title="ANALYZE patching"):
        values = torch.cat([got.outputs, got.stream[:, 1:]], 1)
        for j, row in enumerate(got.rows):
            for path, value in zip(store, values[j], strict=True):
                store[path][row] = value
            for path in inputs:
                fed[path][row] = got.inputs[path][j]
    return {p: torch.stack(x) for p, x in store.items()}, {p: torch.stack(x) for p, x in fed.items()}
