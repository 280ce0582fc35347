"""Many prompts through a model whose weights lie on disk, block by block.

Each block's weights are read once for all prompts, while the block before computes. Every pass is the model's own
forward: the blocks below the one that runs return what they are given, and those above are not reached. So masks,
positions and architectures stay transformers' work, as does all that comes behind the blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from obliteratus.core.progress import progress
from obliteratus.core.types import Subject
from obliteratus.inference.batching import make_batches, pad_rows, run_or_halve, token_budget
from obliteratus.inference.chat_template import Ids
from obliteratus.inference.hooks import DoneError, decoder_blocks
from obliteratus.inference.kv_cache import KeyValues
from obliteratus.inference.memory import free_memory, trim_heap
from obliteratus.inference.resume import PackedRows, ResumePoint
from obliteratus.inference.row_plans import all_variants, prompt_variants
from obliteratus.inference.shared_prefix import (
    PreparedPrompts,
    has_full_attention,
    is_recurrent,
    run_backbone,
    shared_prefix_length,
)
from obliteratus.inference.spill import MEMORY_SHARE, allocate_rows
from obliteratus.summon.sites import find_end_paths

AroundPass = Callable[[int, list[int], Tensor], AbstractContextManager[Any]]
"""(index ℓ of the stream that the pass computes, its rows, their lengths) → context around that pass."""


def no_context(stream: int, rows: list[int], lengths: Tensor) -> AbstractContextManager[Any]:
    """Return a context that does nothing."""
    return nullcontext()


def run_layerwise(
    subject: Subject,
    layerwise: LayerwisePass,
    *,
    top: int | None = None,
    around: AroundPass = no_context,
    title: str = "blocks",
) -> PreparedPrompts:
    """Run the blocks below ``top`` (default: all) and return the prompts, prepared for a pass that begins there."""
    top = subject.n_layers if top is None else top
    _run_blocks(subject, [layerwise], top, around, title)
    return layerwise.prepared(top)


@contextmanager
def run_to_head(
    subject: Subject, passes: Sequence[LayerwisePass], title: str = "blocks"
) -> Iterator[list[PreparedPrompts]]:
    """Run all blocks for these lists of prompts, reading each block once. Inside the context the head is in memory."""
    head = outer_parameters(subject, head=True)
    with _keep_tied_table(subject):
        _run_blocks(subject, passes, subject.n_layers, no_context, title)
        with subject.offloaded.load_block(head):
            yield [layerwise.prepared(subject.n_layers) for layerwise in passes]


@contextmanager
def _keep_tied_table(subject: Subject) -> Iterator[None]:
    """Keep a table that is both embedding and head in memory, if it takes little of what is free; otherwise it is read
    twice."""
    weights, names = subject.offloaded, outer_parameters(subject)
    small = weights.memory_bytes(names) <= MEMORY_SHARE * free_memory(subject)
    with weights.keep_in_memory(names) if weights.tied and small else nullcontext():
        yield


def _run_blocks(subject: Subject, passes: Sequence[LayerwisePass], top: int, around: AroundPass, title: str) -> None:
    """Run the embedding, then the blocks. The next block is read while one computes. Tables are not read ahead, because
    they may be larger than two blocks."""
    blocks = [block_parameters(subject, block) for block in range(top)]
    steps = [(outer_parameters(subject), ()), *zip(blocks, [*blocks[1:], ()], strict=False)]
    rows = sum(layerwise.n for layerwise in passes)
    with torch.inference_mode(), progress(title, (top + 1) * rows) as advance:
        for stream, (names, next_names) in enumerate(steps):
            with subject.offloaded.load_block(names, next_names):
                for layerwise in passes:
                    layerwise.run(stream, around, advance)
            trim_heap()  # glibc holds on to some 10 MB of freed memory more with each block


def block_parameters(subject: Subject, block: int) -> tuple[str, ...]:
    """Return the names of a block's parameters."""
    start = f"{subject.layers}.{block}."
    return tuple(name for name, _ in subject.model.named_parameters() if name.startswith(start))


def outer_parameters(subject: Subject, head: bool = False) -> tuple[str, ...]:
    """Return the names of the embedding's parameters, or of the head's."""
    path = find_end_paths(subject.model)[head]
    return tuple(f"{path}.{name}" for name, _ in subject.module(path).named_parameters())


class LayerwisePass:
    """Rows on their way through the blocks. The prefix that all share is one more row for each variant.

    The stream between two blocks is spilled to disk where it outgrows the memory budget.
    """

    def __init__(self, subject: Subject, ids: Ids, leave: int = 1) -> None:
        """leave: tokens of each row that the shared prefix may not take."""
        self.subject, self.all_variants = subject, all_variants()
        self.variants = prompt_variants(len(ids))
        self.prefix_length = (
            shared_prefix_length(ids, leave) if has_full_attention(subject) and not is_recurrent(subject) else 0
        )
        prefix = [ids[0][: self.prefix_length]] * len(self.all_variants) if self.prefix_length else []
        self.rows: Ids = [*(row[self.prefix_length :] for row in ids), *prefix]
        self.n = len(ids)
        self.batches = make_batches([len(row) for row in self.rows[: self.n]], token_budget(subject))
        self.layout = _pack_batches(
            [len(row) for row in self.rows], [*self.batches, list(range(self.n, len(self.rows)))]
        )
        self.stream = allocate_rows(subject, self.layout.tokens, subject.width, subject.model.dtype)
        self.returns_tuple = False

    def prepared(self, top: int) -> PreparedPrompts:
        """Return the prompts, prepared for a pass that begins at block ``top``, up to which they were run."""
        point = self._resume_point(top + 1, range(self.n))
        return PreparedPrompts(self.rows[: self.n], self.prefix_length, None, point, self.variants)

    def run(self, stream: int, around: AroundPass, advance: Callable[[int], None]) -> None:
        """Compute the stream ℓ of all rows from the stream ℓ − 1, or from their tokens if ℓ is 0."""
        prefix = self._run_prefix(stream) if self.prefix_length else None
        for batch in self.batches:
            for done in run_or_halve(lambda rows: self._run_rows(stream, rows, prefix, around), batch):
                advance(done)

    def _run_prefix(self, stream: int) -> KeyValues:
        """Run the prefix through one block, and return its keys and values there for each variant."""
        cache: Any = DynamicCache()
        rows = list(range(self.n, len(self.rows)))
        point = self._resume_point(stream, rows)
        prompts = PreparedPrompts([self.rows[i] for i in rows], 0, None, point, tuple(self.all_variants))
        self._run_block(stream, prompts, rows, cache, no_context)
        return [(layer.keys, layer.values) for layer in cache.layers[stream - 1 : stream]]

    def _run_rows(self, stream: int, rows: list[int], prefix: KeyValues | None, around: AroundPass) -> int:
        # Only this block's cache is read. The other blocks' say how long the prefix is.
        states = prefix * self.subject.n_layers if prefix else None
        prompts = replace(self.prepared(stream - 1), prefix=states).select(rows)
        self._run_block(stream, prompts, rows, prompts.make_cache(range(len(rows))), around)
        return len(rows)

    def _resume_point(self, stream: int, rows: Sequence[int]) -> ResumePoint | None:
        """Return what the stream ℓ of these rows is computed from; None at 0."""
        if not stream:
            return None
        no_rows = PackedRows.from_lengths([0])
        return ResumePoint(
            self.subject, stream - 1, self.layout, self.stream, no_rows, [], self.returns_tuple, tuple(rows)
        )

    def _run_block(
        self, stream: int, prompts: PreparedPrompts, rows: list[int], cache: Any, around: AroundPass
    ) -> None:
        """Run one pass over the rows, which ends after the block that writes the stream ℓ."""
        ids, lengths = pad_rows(prompts.rows, self.subject.device)
        keep, look, stop = (
            self._keep_stream(stream, rows),
            around(stream, rows, lengths),
            _stop_at(self.subject, stream),
        )
        with keep, look, stop, prompts.pass_over(range(len(rows))):  # hooks see the stream in this order
            run_backbone(self.subject, ids, prompts.prefix_length, cache, prompts.resume_from)

    @contextmanager
    def _keep_stream(self, stream: int, rows: list[int]) -> Iterator[None]:
        """Write the stream ℓ over the stream ℓ − 1 as it leaves its block."""

        def on_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.layout.write(self.stream, rows, args[0] if args else kwargs["hidden_states"])

        def on_output(module: nn.Module, args: tuple[Any, ...], states: Any) -> None:
            self.returns_tuple = isinstance(states, tuple)
            self.layout.write(self.stream, rows, states[0] if self.returns_tuple else states)

        blocks = decoder_blocks(self.subject)
        if stream:
            handle = blocks[stream - 1].register_forward_hook(on_output)
        else:
            handle = blocks[0].register_forward_pre_hook(on_input, with_kwargs=True)
        try:
            yield
        except DoneError:
            pass
        finally:
            handle.remove()


@contextmanager
def _stop_at(subject: Subject, stream: int) -> Iterator[None]:
    """End a pass once the stream ℓ is computed. Hooks that were set before still see it."""

    def stop(*args: Any) -> None:
        raise DoneError

    blocks = decoder_blocks(subject)
    handle = blocks[stream - 1].register_forward_hook(stop) if stream else blocks[0].register_forward_pre_hook(stop)
    try:
        yield
    finally:
        handle.remove()


def _pack_batches(lengths: Sequence[int], batches: Sequence[Sequence[int]]) -> PackedRows:
    """Return a layout with the tokens of each batch side by side, so that they are read and written in one go."""
    order = torch.tensor(list(chain.from_iterable(batches)))
    sizes = torch.tensor(lengths)
    starts = torch.empty_like(sizes)
    starts[order] = sizes[order].cumsum(0) - sizes[order]
    return PackedRows(starts, sizes)
