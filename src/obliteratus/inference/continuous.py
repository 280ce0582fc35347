"""Continuous batching: answers that are written side by side, while others join and leave the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from obliteratus.core.shapes import Float
from obliteratus.core.types import Subject
from obliteratus.inference.chat_template import Ids
from obliteratus.inference.generate import DecodingBatch, prefill
from obliteratus.inference.kv_cache import GrowingLayer, cache_arguments
from obliteratus.inference.row_plans import assign_pass_variants
from obliteratus.inference.shared_prefix import is_recurrent, prepare_prompts

# Steps until the keys and values of a batch move to new buffers: copying them takes about as long as one step.
ROOM = 256
# More rows than there are now, as a share, so that rows which join one by one do not each move all others.
SPARE_ROWS = 0.25


@dataclass
class Window:
    """The part of a batch's buffers that holds something. All rows end before the slot ``end``."""

    rows: int = 0
    first: int = 0
    """The first slot of the longest row."""
    end: int = 0
    rows_allocated: int = 0
    capacity: int = 0
    """Slots allocated."""


class RunningLayer(DynamicLayer):
    """One layer's keys and values in a running batch, buffers of [rows, heads, slots, head].

    Rows end at one slot, as in `kv_cache.GrowingLayer`, so that distances between slots are distances between tokens,
    which attention windows need. What lies in front of a short row is masked.
    """

    def __init__(self, window: Window) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.window = window
        self.buffers: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        own = self.window
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[: own.rows, :, own.end : own.end + 1] = new
        keys, values = (buffer[: own.rows, :, own.first : own.end + 1] for buffer in self.buffers)
        return keys, values

    def get_seq_length(self) -> int:
        return self.window.end - self.window.first

    def move(self, rows: int, end: int, capacity: int) -> None:
        """Move all rows into new buffers in which they end before the slot ``end``."""
        own, size = self.window, self.get_seq_length()
        for i, old in enumerate(self.buffers):
            new = old.new_empty(rows, old.shape[1], capacity, old.shape[3])
            new[: own.rows, :, : end - size] = 0  # see join
            new[: own.rows, :, end - size : end] = old[: own.rows, :, own.first : own.end]
            self.buffers[i] = new

    def join(self, other: GrowingLayer) -> None:
        """Take the rows of a filled layer in behind the own ones. There is room for them."""
        if not other.is_initialized:  # a block that uses another block's keys and values
            return
        own = self.window
        if not self.buffers:
            self.dtype, self.device, self.is_initialized = other.dtype, other.device, True
            shapes = [(own.rows_allocated, x.shape[1], own.capacity, x.shape[3]) for x in other.buffers]
            self.buffers = [x.new_empty(shape) for x, shape in zip(other.buffers, shapes, strict=True)]
        places = slice(own.rows, own.rows + other.rows)
        for buffer, new in zip(self.buffers, other.buffers, strict=True):
            # Memory that was never written may hold NaN, which a mask does not stop.
            buffer[places, :, : own.end - other.slots] = 0
            buffer[places, :, own.end - other.slots : own.end] = new[:, :, : other.slots]

    def put(self, target: int, source: int) -> None:
        """Copy one row over another."""
        own = self.window
        for buffer in self.buffers:
            buffer[target, :, : own.end] = buffer[source, :, : own.end]


class RunningBatch:
    """Rows whose answers are being written. Rows join after their prompt has run, and leave at any time.

    A recurrent model's rows must have one length, and join an empty batch together.
    """

    def __init__(self, subject: Subject) -> None:
        self.subject, self.recurrent = subject, is_recurrent(subject)
        self.lengths: list[int] = []
        """Tokens of each row whose keys and values are in the cache."""
        self.window = Window()
        self.cache: Any = None

    def run_prompts(self, ids: Ids) -> tuple[DecodingBatch, Float[Tensor, "rows vocabulary"]]:
        """Run prompts under the plan that is attached now. Return what `join` takes, and logits of the first tokens.

        Raises ValueError unless the longest come first, which is the order in which `prefill` fills a cache.
        """
        if list(map(len, ids)) != sorted(map(len, ids), reverse=True):
            raise ValueError("rows join with the longest first")
        with torch.inference_mode():
            return prefill(self.subject, prepare_prompts(self.subject, ids), list(range(len(ids))), 0)

    def join(self, batch: DecodingBatch) -> None:
        """Add rows whose prompts have run. They come last from now on."""
        with torch.inference_mode():
            if self.recurrent:
                assert not self.lengths, "padding would enter recurrent states"
                self.cache = batch.cache
            else:
                self._take_in(batch)
        self.lengths += batch.positions[:, 0].tolist()

    def _take_in(self, batch: DecodingBatch) -> None:
        slots = int(batch.cache.layers[0].get_seq_length())
        self._make_room(len(batch.rows), slots)
        if self.cache is None:
            self.cache = Cache(layers=[RunningLayer(self.window) for _ in batch.cache.layers])
        for layer, other in zip(self.cache.layers, batch.cache.layers, strict=True):
            layer.join(other)
        own = self.window
        own.rows += len(batch.rows)
        own.first = min(own.first, own.end - slots)

    def _make_room(self, rows: int, slots: int) -> None:
        """See that so many rows of so many slots can join, and that a step can follow."""
        own = self.window
        wanted, longest = own.rows + rows, max(own.end - own.first, slots)
        if wanted <= own.rows_allocated and slots <= own.end < own.capacity:
            return
        allocated = own.rows_allocated
        if wanted > allocated:
            allocated = max(wanted, int((1 + SPARE_ROWS) * allocated))
        capacity = longest + ROOM
        for layer in self.cache.layers if self.cache is not None else ():
            layer.move(allocated, longest, capacity)
        first = longest - (own.end - own.first)
        own.first, own.end, own.rows_allocated, own.capacity = first, longest, allocated, capacity

    def leave(self, places: Sequence[int]) -> list[int]:
        """Let rows go. Return the former places of the rows that stay, in their new order."""
        stay = [i for i in range(len(self.lengths)) if i not in set(places)]
        if not stay:
            self.lengths, self.window, self.cache = [], Window(), None  # the memory is free again
            return []
        if self.recurrent:
            self.cache.reorder_cache(torch.tensor(stay, device=self.subject.device))
        else:
            stay = self._close_gaps(set(places))
        self.lengths = [self.lengths[i] for i in stay]
        self.window.rows = len(stay)
        self.window.first = self.window.end - max(self.lengths)
        return stay

    def _close_gaps(self, gone: set[int]) -> list[int]:
        """Move the last rows into the places of those that go, and return which former row is at each place."""
        n = len(self.lengths) - len(gone)
        order = list(range(n))
        free = [i for i in order if i in gone]
        moved = [i for i in range(n, len(self.lengths)) if i not in gone]
        with torch.inference_mode():
            for target, source in zip(free, moved, strict=True):
                order[target] = source
                for layer in self.cache.layers:
                    layer.put(target, source)
        return order

    def advance(self, tokens: Sequence[int], variants: Sequence[int] | None = None) -> Float[Tensor, "rows vocabulary"]:
        """Run a further token of each row, and return the logits of the token after it.

        variants: of the rows, where they are under different plans (`row_plans`).
        """
        device = self.subject.device
        lengths = torch.tensor(self.lengths, device=device)[:, None]
        with torch.inference_mode(), assign_pass_variants(variants):
            mask = None
            if not self.recurrent:
                self._make_room(0, 0)
                n = self.window.end - self.window.first + 1
                mask = (torch.arange(n, device=device)[None] >= n - 1 - lengths).long()
                # Without padding the mask says nothing, and attention is faster without it.
                mask = None if bool(mask.all()) else mask
            out = self.subject.model(
                input_ids=torch.tensor(tokens, device=device)[:, None],
                attention_mask=mask,
                position_ids=lengths,
                **cache_arguments(self.subject.model, self.cache),
            )
        self.window.end += 1
        self.lengths = [length + 1 for length in self.lengths]
        logits: Tensor = out.logits[:, -1]
        return logits
