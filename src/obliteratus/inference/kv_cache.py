"""Key-value caches: one for a prefix that all rows share, and one for rows that grow in place and leave early."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from obliteratus.core.types import Subject
from obliteratus.inference.row_plans import all_variants, assign_pass_variants

KeyValues = list[tuple[Tensor, Tensor]]


def cache_arguments(model: nn.Module, cache: Any) -> dict[str, Any]:
    """Return the arguments that give ``model`` this cache. cache: None for a pass that keeps nothing."""
    return {_cache_argument(type(model).forward): cache, "use_cache": cache is not None}


@lru_cache
def _cache_argument(forward: Callable[..., Any]) -> str:
    """Return the argument's name: ``cache`` since transformers 5.24, ``past_key_values`` before and in code that comes
    with a checkpoint. The result is remembered by class, since every token of an answer passes here."""
    return "cache" if "cache" in signature(forward).parameters else "past_key_values"


def prefix_states(subject: Subject, prefix: list[int], lowest: int = 0) -> KeyValues:
    """Run the prefix once for all prompts. Return keys and values [variants, heads, len(prefix), head] of each layer
    from ``lowest`` on."""
    cache: Any = DynamicCache()
    variants = all_variants()
    ids = torch.tensor([prefix] * len(variants), device=subject.device)
    with assign_pass_variants(variants):
        backbone = subject.model.base_model
        backbone(input_ids=ids, **cache_arguments(backbone, cache))
    return [(layer.keys, layer.values) for layer in cache.layers[lowest:]]


class PrefixLayer(DynamicLayer):
    """Keys and values of the shared prefix, [rows, heads, tokens, head]. What a pass appends is not kept."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shared = keys, values
        self.keys, self.values = self.shared
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = self.shared
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)


class GrowingLayer(DynamicLayer):
    """Keys and values of rows that are filled part by part, then grow together inside one buffer, all ending at one
    slot.

    The buffer is not cleared, so memory that no token has reached is never touched and costs nothing.
    """

    def __init__(self, rows: int, slots: int, capacity: int, prefix: tuple[Tensor, Tensor] | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rows, self.slots, self.capacity, self.prefix = rows, slots, capacity, prefix
        self.target: FillTarget | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        pair = (key_states, value_states)
        self.buffers = [x.new_empty(self.rows, x.shape[1], self.capacity, x.shape[3]) for x in pair]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.target is not None:
            return self._fill(self.target, key_states, value_states)
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, self.slots : self.slots + new.shape[-2]] = new
        self.slots += key_states.shape[-2]
        keys, values = (b[:, :, : self.slots] for b in self.buffers)
        return keys, values

    def _fill(self, target: FillTarget, *states: Tensor) -> tuple[Tensor, Tensor]:
        if self.prefix is not None:
            states = tuple(torch.cat([p[target.rows], x], dim=-2) for p, x in zip(self.prefix, states, strict=True))
        n = states[0].shape[-2]
        slots = torch.arange(n, device=self.device)[None] - target.shift[:, None]
        index = slots.clamp(min=0)[:, None, :, None]
        for buffer, x in zip(self.buffers, states, strict=True):
            aligned = x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3]))
            # Memory that was never written may hold NaN, which a mask does not stop.
            buffer[target.rows, :, : self.slots - n] = 0
            buffer[target.rows, :, self.slots - n : self.slots] = aligned
        keys, values = states
        return keys, values

    def get_seq_length(self) -> int:
        if self.target is None:
            return self.slots
        return self.prefix[0].shape[-2] if self.prefix is not None else 0

    def compact(self, target: Tensor, source: Tensor, rows: int) -> None:
        """Move the rows ``source`` into the places ``target``, and drop all beyond the first ``rows``."""
        if not self.is_initialized:  # a block that uses another block's keys and values
            return
        for buffer in self.buffers:
            buffer[target, :, : self.slots] = buffer[source, :, : self.slots]
        self.buffers = [buffer[:rows] for buffer in self.buffers]


@dataclass(frozen=True)
class FillTarget:
    """Rows that a pass over prompts fills, and how far each must move right to end where all rows end."""

    rows: slice
    shift: Tensor
    """[rows], in slots."""


def expand_variants(states: KeyValues, rows: Sequence[int]) -> KeyValues:
    """Return keys and values [rows, heads, tokens, head] from those of each variant; a view if there is only one.

    rows: variant of each row.
    """

    def expand(x: Tensor) -> Tensor:
        return x.expand(len(rows), -1, -1, -1) if len(x) == 1 else x[torch.tensor(rows, device=x.device)]

    return [(expand(keys), expand(values)) for keys, values in states]


def prefix_cache(prefix: KeyValues) -> Cache:
    """Return a cache for one pass over rows that begin with this prefix, [rows, heads, tokens, head]."""
    return Cache(layers=[PrefixLayer(k, v) for k, v in prefix])


def growing_cache(subject: Subject, prefix: KeyValues | None, rows: int, slots: int, room: int) -> Any:
    """Return a cache for the answers to so many prompts.

    prefix: its keys and values, [rows, heads, tokens, head]. slots: tokens of the longest prompt, with the prefix.
    room: tokens of the longest answer.
    """
    states: list[tuple[Tensor, Tensor] | None] = list(prefix) if prefix else [None] * subject.n_layers
    return Cache(layers=[GrowingLayer(rows, slots, slots + room, state) for state in states])


@contextmanager
def fill_rows(cache: Any, target: FillTarget) -> Iterator[None]:
    """Let passes write the prompts of these rows. Outside the context they write the next token of every row."""
    for layer in cache.layers:
        layer.target = target
    try:
        yield
    finally:
        for layer in cache.layers:
            layer.target = None
