"""What as much of the model does, drawn by chance: without it no part can be said to matter more than its size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Generator, Tensor

from obliteratus.core.types import Change, Mask, Site, Subject, ZeroOutput
from obliteratus.study.base import Knockout, StudyContext, strategies
from obliteratus.study.neurons import DENSE
from obliteratus.study.strategies import ATTENTION, FFN, chunk_of, head_sites, spec, writers
from obliteratus.weights.matrices import count_inputs, expand_experts

Kind = Literal["heads", "attention", "ffn", "layers", "neurons", "experts", "embeddings"]
Pool = list[tuple[Site, int]]
"""Matrices, one expert each, and how many inputs each has."""
# Apart from all else that is drawn by the study's seed, and from each other's kinds.
SALT = 1_000_003


@strategies.register("random")
def random(
    ground: StudyContext,
    *,
    like: Kind = "heads",
    count: Annotated[int, Field(ge=1)] = 4,
    chunk: Annotated[int, Field(ge=0)] = 0,
) -> Iterator[Knockout]:
    """Controls: as many inputs of writing matrices as one part ``like`` this has, drawn from all blocks; for embeddings
    as many dimensions as a ``chunk``. ``count`` of them, by the study's seed."""
    subject, generator = ground.subject, Generator().manual_seed(SALT * (1 + KINDS.index(like)) + ground.seed)
    for number in range(count):
        if like == "embeddings":
            dims = torch.randperm(subject.width, generator=generator)[: chunk_of(subject, chunk)].sort().values
            changes: list[Change] = [ZeroOutput(s, dims) for s in subject.sites if s.part == "embed"]
        else:
            changes = [c for part in POOLS[like](subject) for c in draw_masks(*part, generator)]
        yield replace(spec(subject, "random", f"random {like} {number}", changes, number), control=True)


def draw_masks(pool: Pool, n: int, generator: Generator) -> list[Change]:
    """Masks on so many inputs in all, drawn without replacement."""
    sizes = torch.tensor([size for _, size in pool])
    owner = torch.arange(len(pool)).repeat_interleave(sizes)
    place = torch.cat([torch.arange(size) for _, size in pool])
    chosen = torch.randperm(len(owner), generator=generator)[:n]
    found: dict[int, Tensor] = {
        k: place[chosen[owner[chosen] == k]].sort().values for k in owner[chosen].unique().tolist()
    }
    return [Mask(pool[k][0], inputs) for k, inputs in found.items()]


def _pool(subject: Subject, parts: tuple[str, ...]) -> tuple[Pool, int]:
    """All matrices of these parts, and how many inputs a block's have on average."""
    by_block = writers(subject, parts)
    sites = [one for own in by_block.values() for s in own for one in expand_experts(subject.module(s.path), s)]
    pool = [(s, count_inputs(subject.module(s.path), s)) for s in sites]
    return pool, round(sum(size for _, size in pool) / len(by_block))


def _heads(subject: Subject) -> list[tuple[Pool, int]]:
    sites = head_sites(subject)
    return [([(s, count_inputs(subject.module(s.path), s)) for s, _ in sites], sites[0][1])]


def _single(subject: Subject) -> list[tuple[Pool, int]]:
    return [(_pool(subject, DENSE)[0], 1)]


def _expert(subject: Subject) -> list[tuple[Pool, int]]:
    pool, _ = _pool(subject, ("expert.out",))
    return [(pool, pool[0][1])]


POOLS: dict[str, Callable[[Subject], list[tuple[Pool, int]]]] = {
    "heads": _heads,
    "attention": lambda subject: [_pool(subject, ATTENTION)],
    "ffn": lambda subject: [_pool(subject, FFN)],
    "layers": lambda subject: [_pool(subject, ATTENTION), _pool(subject, FFN)],
    "neurons": _single,
    "experts": _expert,
}
KINDS = (*POOLS, "embeddings")
