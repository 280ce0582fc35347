"""Key-value caches: a prefix shared by all rows, and rows that grow in place and leave early."""

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
from obliteratus.inference.row_plans import all_variants, rows_in_pass

KeyValues = list[tuple[Tensor, Tensor]]


def cache_arguments(model: nn.Module, cache: Any) -> dict[str, Any]:
    """The arguments that give ``model`` this cache; None for a pass that keeps nothing."""
    return {_name_of_cache(type(model).forward): cache, "use_cache": cache is not None}


@lru_cache
def _name_of_cache(forward: Callable[..., Any]) -> str:
    """transformers 5.24 calls it ``cache``; what came before, and code that comes with a checkpoint,
    ``past_key_values``. Asked once a class: answers pass here with each token."""
    return "cache" if "cache" in signature(forward).parameters else "past_key_values"


def prefix_states(subject: Subject, prefix: list[int], lowest: int = 0) -> KeyValues:
    """Keys and values [variants, heads, len(prefix), head] of each layer from ``lowest``, once for all prompts."""
    cache: Any = DynamicCache()
    kinds = all_variants()
    ids = torch.tensor([prefix] * len(kinds), device=subject.device)
    with rows_in_pass(kinds):
        trunk = subject.model.base_model
        trunk(input_ids=ids, **cache_arguments(trunk, cache))
    return [(layer.keys, layer.values) for layer in cache.layers[lowest:]]


class PrefixLayer(DynamicLayer):
    """The shared prefix, [rows, heads, tokens, head]; what is appended is not kept."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shared = keys, values
        self.keys, self.values = self.shared
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = self.shared
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)


class GrowingLayer(DynamicLayer):
    """Rows that are filled part by part, then grow in place together inside one buffer, all ending at one slot.

    The buffer is not cleared: memory that no token has reached yet is never touched, so it costs nothing.
    """

    def __init__(self, rows: int, slots: int, capacity: int, prefix: tuple[Tensor, Tensor] | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rows, self.slots, self.capacity, self.prefix = rows, slots, capacity, prefix
        self.filling: Filling | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        pair = (key_states, value_states)
        self.buffers = [x.new_empty(self.rows, x.shape[1], self.capacity, x.shape[3]) for x in pair]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.filling is not None:
            return self._fill(self.filling, key_states, value_states)
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, self.slots : self.slots + new.shape[-2]] = new
        self.slots += key_states.shape[-2]
        keys, values = (b[:, :, : self.slots] for b in self.buffers)
        return keys, values

    def _fill(self, filling: Filling, *states: Tensor) -> tuple[Tensor, Tensor]:
        if self.prefix is not None:
            states = tuple(torch.cat([p[filling.rows], x], dim=-2) for p, x in zip(self.prefix, states, strict=True))
        n = states[0].shape[-2]
        slots = torch.arange(n, device=self.device)[None] - filling.shift[:, None]
        index = slots.clamp(min=0)[:, None, :, None]
        for buffer, x in zip(self.buffers, states, strict=True):
            aligned = x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3]))
            buffer[filling.rows, :, : self.slots - n] = 0  # what never was written may be NaN, masked or not
            buffer[filling.rows, :, self.slots - n : self.slots] = aligned
        keys, values = states
        return keys, values

    def get_seq_length(self) -> int:
        if self.filling is None:
            return self.slots
        return self.prefix[0].shape[-2] if self.prefix is not None else 0

    def keep(self, target: Tensor, source: Tensor, rows: int) -> None:
        """Move the rows ``source`` into the places ``target`` and drop all beyond the first ``rows``."""
        if not self.is_initialized:  # a block that uses another's keys and values
            return
        for buffer in self.buffers:
            buffer[target, :, : self.slots] = buffer[source, :, : self.slots]
        self.buffers = [buffer[:rows] for buffer in self.buffers]


@dataclass(frozen=True)
class Filling:
    """Which rows a pass over prompts fills, and how far each must move right to end where all end."""

    rows: slice
    shift: Tensor
    """[rows], in slots."""


def expand_variants(states: KeyValues, rows: Sequence[int]) -> KeyValues:
    """Each row's own variant of states [variants, heads, tokens, head]; a view where all rows share them."""

    def each(x: Tensor) -> Tensor:
        return x.expand(len(rows), -1, -1, -1) if len(x) == 1 else x[torch.tensor(rows, device=x.device)]

    return [(each(keys), each(values)) for keys, values in states]


def prefix_cache(prefix: KeyValues) -> Cache:
    """A cache for one pass over rows that begin with a prefix, [rows, heads, tokens, head]."""
    return Cache(layers=[PrefixLayer(k, v) for k, v in prefix])


def growing_cache(subject: Subject, prefix: KeyValues | None, rows: int, slots: int, room: int) -> Any:
    """A cache for the answers of ``rows`` prompts of at most ``slots`` tokens, prefix included, and ``room`` more.

    prefix: [rows, heads, tokens, head].
    """
    states: list[tuple[Tensor, Tensor] | None] = list(prefix) if prefix else [None] * subject.n_layers
    return Cache(layers=[GrowingLayer(rows, slots, slots + room, state) for state in states])


@contextmanager
def fill_rows(cache: Any, part: Filling) -> Iterator[None]:
    """Inside, passes write the keys and values of these rows; outside, of the next token of every row."""
    for layer in cache.layers:
        layer.filling = part
    try:
        yield
    finally:
        for layer in cache.layers:
            layer.filling = None
