"""Strategies: which parts of a model are knocked out. Each is a function from the model to plans, one for each part.

All act on what is written into the stream. Of a head that is its columns of attention's output matrix, and nothing
else: queries, keys and values of a silenced head reach no other part, and keys and values may be shared by several.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field

from obliteratus.core.errors import UserError
from obliteratus.core.settings import expand_part
from obliteratus.core.types import Change, Mask, Plan, Site, Subject, ZeroOutput
from obliteratus.study.base import Knockout, StudyContext, strategies
from obliteratus.summon.sites import find_architecture, has_heads
from obliteratus.weights.matrices import count_inputs, expand_experts, matrix_shape

Layers = tuple[int, ...] | None
"""Blocks, from 0; None is all of them."""
FFN, ATTENTION = expand_part("mlp.out"), ("attn.out",)


def writers(subject: Subject, parts: Sequence[str], layers: Layers = None) -> dict[int, list[Site]]:
    """Writing sites by block. Raises UserError for blocks that the model has not, or where it has no such part."""
    for layer in layers or ():
        if not 0 <= layer < subject.n_layers:
            raise UserError(f"study: layers names block {layer}, and the model has 0 to {subject.n_layers - 1}")
    wanted = range(subject.n_layers) if layers is None else layers
    mine = [s for s in subject.sites if s.role == "writes" and s.part in parts]
    found = {layer: [s for s in mine if s.layer == layer] for layer in wanted}
    there = {layer: sites for layer, sites in found.items() if sites}
    if not there:
        raise UserError(f"study: none of these blocks has {' or '.join(parts)}; leave the strategy out")
    return there


def spec(subject: Subject, name: str, component: str, changes: Sequence[Change], part: int = -1) -> Knockout:
    """A spec whose layer and size follow from its changes."""
    layer = min(change.site.layer for change in changes)
    size = sum(_size(subject, change) for change in changes)
    return Knockout(name, component, layer, part, size, Plan(tuple(changes), subject.source.digest))


def _size(subject: Subject, change: Change) -> int:
    module = subject.module(change.site.path)
    out, inside = matrix_shape(module, change.site)
    if isinstance(change, Mask):
        return len(change.neurons) * out
    assert isinstance(change, ZeroOutput), "strategies silence"
    return len(expand_experts(module, change.site)) * inside * (out if change.outputs is None else len(change.outputs))


# ------------------------------------------------------------------------------------------- whole blocks
@strategies.register("layers")
def whole_layers(ground: StudyContext, *, layers: Layers = None) -> Iterator[Knockout]:
    """Each block: the stream passes it by."""
    for layer, sites in writers(ground.subject, (*ATTENTION, *FFN), layers).items():
        yield spec(ground.subject, "layers", f"block {layer}", [ZeroOutput(s) for s in sites])


@strategies.register("ranges")
def ranges(
    ground: StudyContext, *, size: Annotated[int, Field(ge=2)] = 2, step: Annotated[int, Field(ge=1)] = 1
) -> Iterator[Knockout]:
    """So many neighbouring blocks at once, beginning at every ``step``-th."""
    subject = ground.subject
    if size > subject.n_layers:
        raise UserError(f"study: ranges of {size} blocks, and the model has {subject.n_layers}")
    for first in range(0, subject.n_layers - size + 1, step):
        last = first + size - 1
        sites = writers(subject, (*ATTENTION, *FFN), tuple(range(first, last + 1))).values()
        yield spec(subject, "ranges", f"blocks {first}–{last}", [ZeroOutput(s) for own in sites for s in own])


@strategies.register("attention")
def attention(ground: StudyContext, *, layers: Layers = None) -> Iterator[Knockout]:
    """What each block's attention writes, or what another mixer does in its place."""
    for layer, sites in writers(ground.subject, ATTENTION, layers).items():
        yield spec(ground.subject, "attention", f"block {layer} attention", [ZeroOutput(s) for s in sites])


@strategies.register("ffn")
def ffn(ground: StudyContext, *, layers: Layers = None) -> Iterator[Knockout]:
    """What each block's feed-forward half writes, with all its experts; routers are left alone."""
    for layer, sites in writers(ground.subject, FFN, layers).items():
        yield spec(ground.subject, "ffn", f"block {layer} ffn", [ZeroOutput(s) for s in sites])


# ------------------------------------------------------------------------------------- parts of blocks
@strategies.register("heads", cite="arXiv:1905.10650")
def heads(ground: StudyContext, *, layers: Layers = None, heads: tuple[int, ...] | None = None) -> Iterator[Knockout]:
    """Each query head: its columns of the output matrix. ``heads`` restricts them to these numbers."""
    for site, size in head_sites(ground.subject, layers):
        count = count_inputs(ground.subject.module(site.path), site) // size
        for head in within(heads, count, "heads"):
            mask = Mask(site, torch.arange(head * size, (head + 1) * size))
            yield spec(ground.subject, "heads", f"block {site.layer} head {head}", [mask], head)


def head_sites(subject: Subject, layers: Layers = None) -> list[tuple[Site, int]]:
    """Attention's output matrices and the columns of one head. UserError where no block has heads."""
    family, count = (
        find_architecture(subject.model.config),
        int(subject.model.config.get_text_config().num_attention_heads),
    )
    sites = [s for own in writers(subject, ATTENTION, layers).values() for s in own if has_heads(family, s)]
    if not sites:
        raise UserError("study: none of these blocks has attention heads; leave the strategy heads out")
    return [(site, count_inputs(subject.module(site.path), site) // count) for site in sites]


def within(named: Sequence[int] | None, count: int, what: str) -> Sequence[int]:
    """These numbers, or all. Raises UserError for one that is not there."""
    for number in named or ():
        if not 0 <= number < count:
            raise UserError(f"study: {what} names {number}, and there are 0 to {count - 1}")
    return range(count) if named is None else named


@strategies.register("experts")
def experts(
    ground: StudyContext, *, layers: Layers = None, experts: tuple[int, ...] | None = None
) -> Iterator[Knockout]:
    """Each expert of each stack: tokens are routed to it as before, and it writes nothing."""
    for layer, sites in writers(ground.subject, ("expert.out",), layers).items():
        for site in sites:
            every = expand_experts(ground.subject.module(site.path), site)
            for number in within(experts, len(every), "experts"):
                silent = ZeroOutput(replace(site, expert=number))
                yield spec(ground.subject, "experts", f"block {layer} expert {number}", [silent], number)


@strategies.register("embeddings")
def embeddings(ground: StudyContext, *, chunk: Annotated[int, Field(ge=0)] = 0) -> Iterator[Knockout]:
    """So many neighbouring dimensions of the embeddings at once (0: a sixteenth of the width); the head that makes
    logits is left alone where it shares their matrix."""
    subject = ground.subject
    tables = [s for s in subject.sites if s.part == "embed"]
    for part, dims in enumerate(torch.arange(subject.width).split(chunk_of(subject, chunk))):
        name = f"dimensions {int(dims[0])}–{int(dims[-1])}"
        yield spec(subject, "embeddings", name, [ZeroOutput(s, dims) for s in tables], part)


def chunk_of(subject: Subject, chunk: int) -> int:
    """Dimensions of one chunk. Raises UserError for more than there are."""
    if chunk > subject.width:
        raise UserError(f"study: chunks of {chunk} dimensions, and the embeddings have {subject.width}")
    return chunk or max(1, subject.width // 16)
