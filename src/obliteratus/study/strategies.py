"""Strategies list the parts of a model that are knocked out. Each is a function from the model to one plan per part.

All act on what is written into the residual stream. For a head these are its columns of attention's output matrix and
nothing else: the queries, keys and values of a silenced head reach no other part, and several heads may share keys and
values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from obliteratus.core.errors import UserError
from obliteratus.core.settings import expand_part
from obliteratus.core.shapes import Float
from obliteratus.core.types import Change, Mask, Plan, Site, Subject, ZeroOutput
from obliteratus.inference.chat_template import Ids
from obliteratus.inference.token_losses import token_losses
from obliteratus.study.base import Knockout, StudyContext, strategies
from obliteratus.summon.sites import find_architecture, has_heads
from obliteratus.weights.matrices import count_inputs, expand_experts, matrix_shape, read_weight

Layers = tuple[int, ...] | None
"""Block numbers from 0; None is all blocks."""
FFN, ATTENTION, DENSE = expand_part("mlp.out"), ("attn.out",), ("mlp.out", "shared.out")


def writers_by_block(subject: Subject, parts: Sequence[str], layers: Layers = None) -> dict[int, list[Site]]:
    """Return the writing sites of these parts by block.

    Raises UserError for blocks that the model does not have, and if no block has such a part.
    """
    for layer in layers or ():
        if not 0 <= layer < subject.n_layers:
            raise UserError(f"study: layers names block {layer}, but the model has blocks 0 to {subject.n_layers - 1}")
    sites = [s for s in subject.sites if s.role == "writes" and s.part in parts]
    blocks = range(subject.n_layers) if layers is None else layers
    by_block = {layer: [s for s in sites if s.layer == layer] for layer in blocks}
    by_block = {layer: own for layer, own in by_block.items() if own}
    if not by_block:
        raise UserError(f"study: none of these blocks has {' or '.join(parts)}; leave the strategy out")
    return by_block


def make_knockout(
    subject: Subject, strategy: str, component: str, changes: Sequence[Change], part: int = -1
) -> Knockout:
    """Return a knockout whose layer and size follow from its changes."""
    layer = min(change.site.layer for change in changes)
    size = sum(_count_entries(subject, change) for change in changes)
    return Knockout(strategy, component, layer, part, size, Plan(tuple(changes), subject.source.digest))


def _count_entries(subject: Subject, change: Change) -> int:
    module = subject.module(change.site.path)
    rows, columns = matrix_shape(module, change.site)
    if isinstance(change, Mask):
        return len(change.neurons) * rows
    assert isinstance(change, ZeroOutput), "strategies only silence"
    outputs = rows if change.outputs is None else len(change.outputs)
    return len(expand_experts(module, change.site)) * columns * outputs


# ------------------------------------------------------------------------------------------- whole blocks
@strategies.register("layers")
def whole_layers(context: StudyContext, *, layers: Layers = None) -> Iterator[Knockout]:
    """Knock out each block, so that the residual stream bypasses it."""
    for layer, sites in writers_by_block(context.subject, (*ATTENTION, *FFN), layers).items():
        yield make_knockout(context.subject, "layers", f"block {layer}", [ZeroOutput(s) for s in sites])


@strategies.register("ranges")
def ranges(
    context: StudyContext, *, size: Annotated[int, Field(ge=2)] = 2, step: Annotated[int, Field(ge=1)] = 1
) -> Iterator[Knockout]:
    """Knock out ``size`` neighboring blocks at once, starting at every ``step``-th block."""
    subject = context.subject
    if size > subject.n_layers:
        raise UserError(f"study: ranges of {size} blocks, but the model has {subject.n_layers}")
    for first in range(0, subject.n_layers - size + 1, step):
        last = first + size - 1
        sites = writers_by_block(subject, (*ATTENTION, *FFN), tuple(range(first, last + 1))).values()
        changes = [ZeroOutput(s) for own in sites for s in own]
        yield make_knockout(subject, "ranges", f"blocks {first}–{last}", changes)


@strategies.register("attention")
def attention(context: StudyContext, *, layers: Layers = None) -> Iterator[Knockout]:
    """Knock out what each block's attention writes, or the token mixer that stands in its place."""
    for layer, sites in writers_by_block(context.subject, ATTENTION, layers).items():
        changes = [ZeroOutput(s) for s in sites]
        yield make_knockout(context.subject, "attention", f"block {layer} attention", changes)


@strategies.register("ffn")
def ffn(context: StudyContext, *, layers: Layers = None) -> Iterator[Knockout]:
    """Knock out what each block's feed-forward half writes, with all its experts; routers stay as they are."""
    for layer, sites in writers_by_block(context.subject, FFN, layers).items():
        yield make_knockout(context.subject, "ffn", f"block {layer} ffn", [ZeroOutput(s) for s in sites])


# ------------------------------------------------------------------------------------- parts of blocks
@strategies.register("heads", cite="arXiv:1905.10650")
def heads(context: StudyContext, *, layers: Layers = None, heads: tuple[int, ...] | None = None) -> Iterator[Knockout]:
    """Knock out each query head: its columns of the output matrix. ``heads`` restricts them to these numbers."""
    for site, width in head_sites(context.subject, layers):
        count = count_inputs(context.subject.module(site.path), site) // width
        for head in select_numbers(heads, count, "heads"):
            mask = Mask(site, torch.arange(head * width, (head + 1) * width))
            yield make_knockout(context.subject, "heads", f"block {site.layer} head {head}", [mask], head)


def head_sites(subject: Subject, layers: Layers = None) -> list[tuple[Site, int]]:
    """Return attention's output matrices with the columns per head. Raises UserError if no block has heads."""
    architecture = find_architecture(subject.model.config)
    count = int(subject.model.config.get_text_config().num_attention_heads)
    by_block = writers_by_block(subject, ATTENTION, layers)
    sites = [s for own in by_block.values() for s in own if has_heads(architecture, s)]
    if not sites:
        raise UserError("study: none of these blocks has attention heads; leave the strategy heads out")
    return [(site, count_inputs(subject.module(site.path), site) // count) for site in sites]


def select_numbers(numbers: Sequence[int] | None, count: int, option: str) -> Sequence[int]:
    """Return these numbers, or all. Raises UserError for one that does not exist."""
    for number in numbers or ():
        if not 0 <= number < count:
            raise UserError(f"study: {option} names {number}, but there are only 0 to {count - 1}")
    return range(count) if numbers is None else numbers


@strategies.register("experts")
def experts(
    context: StudyContext, *, layers: Layers = None, experts: tuple[int, ...] | None = None
) -> Iterator[Knockout]:
    """Knock out each expert of each block: tokens are routed to it as before, and it writes nothing."""
    for layer, sites in writers_by_block(context.subject, ("expert.out",), layers).items():
        for site in sites:
            count = len(expand_experts(context.subject.module(site.path), site))
            for number in select_numbers(experts, count, "experts"):
                change = ZeroOutput(replace(site, expert=number))
                yield make_knockout(context.subject, "experts", f"block {layer} expert {number}", [change], number)


@strategies.register("neurons")
def neurons(
    context: StudyContext,
    *,
    layers: Layers = None,
    top: Annotated[int, Field(ge=1)] = 8,
    by: Literal["written", "weight"] = "written",
) -> Iterator[Knockout]:
    """Knock out the ``top`` neurons of each block's dense feed-forward matrix, one by one, highest score first.

    by: ``written`` scores the mean length of what a neuron writes on the study's texts, |a_j|·‖W_j‖; ``weight`` scores
    ‖W_j‖ alone. Raises UserError if all feed-forward halves are stacks of experts.
    """
    subject = context.subject
    sites = [s for own in writers_by_block(subject, DENSE, layers).values() for s in own if not s.stacked]
    if not sites:
        raise UserError("study: all feed-forward matrices are stacks of experts; leave the strategy neurons out")
    activity = mean_input_magnitudes(subject, context.texts, sites) if by == "written" else {}
    for site in sites:
        lengths = read_weight(subject.module(site.path), site).norm(dim=0)
        score = lengths * activity[site.path] if by == "written" else lengths
        for neuron in score.argsort(descending=True, stable=True)[:top].tolist():
            component = f"block {site.layer} {site.part.partition('.')[0]} neuron {neuron}"
            yield make_knockout(subject, "neurons", component, [Mask(site, torch.tensor([neuron]))], neuron)


def mean_input_magnitudes(subject: Subject, texts: Ids, sites: Sequence[Site]) -> dict[str, Float[Tensor, " in"]]:
    """Return the mean |input| of each site over all tokens of the texts, by path."""
    totals: dict[str, Tensor] = {}
    tokens = sum(map(len, texts))

    def make_hook(path: str) -> Any:
        def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            totals[path] = totals.get(path, torch.zeros(())) + args[0].abs().double().flatten(0, -2).sum(0).cpu()

        return add

    handles = [subject.module(s.path).register_forward_pre_hook(make_hook(s.path)) for s in sites]
    try:
        for row in texts:  # one by one, so that no padding is counted
            token_losses(subject, [row])
    finally:
        for handle in handles:
            handle.remove()
    return {path: (total / tokens).float().to(subject.device) for path, total in totals.items()}


# ------------------------------------------------------------------------------------------- embeddings
@strategies.register("embeddings")
def embeddings(context: StudyContext, *, chunk: Annotated[int, Field(ge=0)] = 0) -> Iterator[Knockout]:
    """Knock out ``chunk`` neighboring dimensions of the embeddings at once (0: a sixteenth of the width).

    An unembedding that shares the embeddings' matrix stays as it is.
    """
    subject = context.subject
    sites = [s for s in subject.sites if s.part == "embed"]
    for part, dims in enumerate(torch.arange(subject.width).split(chunk_width(subject, chunk))):
        component = f"dimensions {int(dims[0])}–{int(dims[-1])}"
        yield make_knockout(subject, "embeddings", component, [ZeroOutput(s, dims) for s in sites], part)


def chunk_width(subject: Subject, chunk: int) -> int:
    """Return the number of dimensions of a chunk. Raises UserError for more than there are."""
    if chunk > subject.width:
        raise UserError(f"study: chunks of {chunk} dimensions, but the embeddings have {subject.width}")
    return chunk or max(1, subject.width // 16)
