"""Random controls: without them, no part can be said to matter more than its size alone explains."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Generator

from obliteratus.core.types import Change, Mask, Site, Subject, ZeroOutput
from obliteratus.study.base import Knockout, StudyContext, strategies
from obliteratus.study.strategies import (
    ATTENTION,
    DENSE,
    FFN,
    chunk_width,
    head_sites,
    make_knockout,
    writers_by_block,
)
from obliteratus.weights.matrices import count_inputs, expand_experts

Kind = Literal["heads", "attention", "ffn", "layers", "neurons", "experts", "embeddings"]
Pool = list[tuple[Site, int]]
"""Matrices, one per expert, and the number of inputs of each."""
SEED_FACTOR = 1_000_003  # keeps these draws apart from all others by the study's seed, and from those of other kinds


@strategies.register("random")
def random(
    context: StudyContext,
    *,
    like: Kind = "heads",
    count: Annotated[int, Field(ge=1)] = 4,
    chunk: Annotated[int, Field(ge=0)] = 0,
) -> Iterator[Knockout]:
    """Knock out random inputs of writing matrices, as many as one part of the kind ``like`` has, from all blocks.

    For embeddings these are as many dimensions as a ``chunk``. There are ``count`` controls, by the study's seed.
    """
    subject = context.subject
    generator = Generator().manual_seed(SEED_FACTOR * (1 + KINDS.index(like)) + context.seed)
    for number in range(count):
        if like == "embeddings":
            dims = torch.randperm(subject.width, generator=generator)[: chunk_width(subject, chunk)].sort().values
            changes: list[Change] = [ZeroOutput(s, dims) for s in subject.sites if s.part == "embed"]
        else:
            changes = [c for pool, n in POOLS[like](subject) for c in draw_masks(pool, n, generator)]
        yield replace(make_knockout(subject, "random", f"random {like} {number}", changes, number), control=True)


def draw_masks(pool: Pool, n: int, generator: Generator) -> list[Change]:
    """Return masks on n inputs in total, drawn without replacement from all matrices of the pool."""
    sizes = torch.tensor([size for _, size in pool])
    matrix = torch.arange(len(pool)).repeat_interleave(sizes)
    column = torch.cat([torch.arange(size) for _, size in pool])
    drawn = torch.randperm(len(matrix), generator=generator)[:n]
    return [Mask(pool[k][0], column[drawn[matrix[drawn] == k]].sort().values) for k in matrix[drawn].unique().tolist()]


def _block_pool(subject: Subject, parts: tuple[str, ...]) -> tuple[Pool, int]:
    """All matrices of these parts, and the average number of inputs of a block's."""
    by_block = writers_by_block(subject, parts)
    sites = [s for own in by_block.values() for site in own for s in expand_experts(subject.module(site.path), site)]
    pool = [(s, count_inputs(subject.module(s.path), s)) for s in sites]
    return pool, round(sum(size for _, size in pool) / len(by_block))


def _head_pools(subject: Subject) -> list[tuple[Pool, int]]:
    sites = head_sites(subject)
    return [([(s, count_inputs(subject.module(s.path), s)) for s, _ in sites], sites[0][1])]


def _expert_pools(subject: Subject) -> list[tuple[Pool, int]]:
    pool, _ = _block_pool(subject, ("expert.out",))
    return [(pool, pool[0][1])]


POOLS: dict[str, Callable[[Subject], list[tuple[Pool, int]]]] = {
    "heads": _head_pools,
    "attention": lambda subject: [_block_pool(subject, ATTENTION)],
    "ffn": lambda subject: [_block_pool(subject, FFN)],
    "layers": lambda subject: [_block_pool(subject, ATTENTION), _block_pool(subject, FFN)],
    "neurons": lambda subject: [(_block_pool(subject, DENSE)[0], 1)],
    "experts": _expert_pools,
}
KINDS = (*POOLS, "embeddings")
