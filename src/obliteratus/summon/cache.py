"""Key-value caches: a prefix shared by all rows, and rows that grow in place and leave early."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from obliteratus.types import Subject

KeyValues = list[tuple[Tensor, Tensor]]


def prefix_states(subject: Subject, prefix: list[int]) -> KeyValues:
    """Keys and values [1, heads, len(prefix), head] of each layer, computed once for all prompts."""
    cache: Any = DynamicCache()
    ids = torch.tensor([prefix], device=subject.device)
    subject.model.base_model(input_ids=ids, past_key_values=cache, use_cache=True)
    return [(layer.keys, layer.values) for layer in cache.layers]


class PrefixLayer(DynamicLayer):
    """The shared prefix, expanded over the rows without a copy; what is appended is not kept."""

    def __init__(self, keys: Tensor, values: Tensor, rows: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shared = keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1)
        self.keys, self.values = self.shared
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = self.shared
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)


class GrowingLayer(DynamicLayer):
    """Rows that grow in place inside a buffer made once: no concatenation per token."""

    def __init__(self, capacity: int, prefix: tuple[Tensor, Tensor] | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.capacity, self.prefix, self.length = capacity, prefix, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        self.buffers = [_buffer(x, self.capacity) for x in (key_states, value_states)]
        if self.prefix is not None:
            self._append(*(x.expand(key_states.shape[0], -1, -1, -1) for x in self.prefix))

    def _append(self, *states: Tensor) -> tuple[Tensor, Tensor]:
        end = self.length + states[0].shape[-2]
        for buffer, new in zip(self.buffers, states, strict=True):
            buffer[:, :, self.length : end] = new
        self.length = end
        keys, values = (b[:, :, :end] for b in self.buffers)
        self.keys, self.values = keys, values
        return keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self._append(key_states, value_states)

    def get_seq_length(self) -> int:
        prefix = self.prefix[0].shape[-2] if self.prefix is not None and not self.is_initialized else 0
        return self.length or prefix

    def align_right(self, shift: Tensor) -> None:
        """Move row i right by shift[i] slots, so that all rows end at the same slot. shift: [rows]."""
        slots = torch.arange(self.length, device=self.device)[None] - shift[:, None]
        index = slots.clamp(min=0)[:, None, :, None]
        for buffer in self.buffers:
            view = buffer[:, :, : self.length]
            view.copy_(view.gather(2, index.expand(-1, view.shape[1], -1, view.shape[3])))

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these. rows: indices."""
        self.buffers = [b[rows] for b in self.buffers]
        self.keys, self.values = (b[:, :, : self.length] for b in self.buffers)


def _buffer(like: Tensor, capacity: int) -> Tensor:
    rows, heads, _, size = like.shape
    return like.new_zeros(rows, heads, capacity, size)


def shared(prefix: KeyValues, rows: int) -> Cache:
    """A cache for one pass over ``rows`` rows that all begin with the prefix."""
    return Cache(layers=[PrefixLayer(k, v, rows) for k, v in prefix])


def growing(subject: Subject, prefix: KeyValues | None, capacity: int) -> Any:
    """A cache for generation, for rows of at most ``capacity`` tokens, prefix included."""
    states: list[tuple[Tensor, Tensor] | None] = list(prefix) if prefix else [None] * subject.n_layers
    return Cache(layers=[GrowingLayer(capacity, state) for state in states])
