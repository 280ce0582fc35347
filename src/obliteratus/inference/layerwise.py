"""Many prompts through a model whose weights lie on disk, block by block: each block's weights are read once for all of
them, while the block before it computes.

Every pass is the model's own forward: blocks below the one that runs pass on what they are given (`lower`), those above
are not reached. So masks, positions and architectures stay transformers' work, as does what comes behind the blocks.
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
from obliteratus.inference.batching import make_batches, pad_rows, run_or_halve, state_bytes, token_budget
from obliteratus.inference.chat_template import Ids
from obliteratus.inference.hooks import DoneError, decoder_blocks
from obliteratus.inference.kv_cache import KeyValues
from obliteratus.inference.memory import free_memory, trim_heap
from obliteratus.inference.resume import PackedRows, ResumePoint
from obliteratus.inference.row_plans import all_variants, variants_of
from obliteratus.inference.shared_prefix import (
    PreparedPrompts,
    has_full_attention,
    is_recurrent,
    run_backbone,
    shared_prefix_length,
)
from obliteratus.inference.spill import SHARE, allocate_rows
from obliteratus.summon.sites import find_end_paths

Look = Callable[[int, list[int], Tensor], AbstractContextManager[Any]]
"""(stream index ℓ that the pass makes, its rows, their lengths) → what is around the pass that gives it."""


def ignore_layer(stream: int, rows: list[int], lengths: Tensor) -> AbstractContextManager[Any]:
    """Nobody looks."""
    return nullcontext()


def run_layerwise(
    subject: Subject, sweep: LayerwisePass, *, top: int | None = None, look: Look = ignore_layer, title: str = "blocks"
) -> PreparedPrompts:
    """The prompts with their blocks below ``top`` run (default: all), so that what comes next begins there."""
    top = subject.n_layers if top is None else top
    _through_blocks(subject, [sweep], top, look, title)
    return sweep.prompts(top)


@contextmanager
def run_to_head(
    subject: Subject, sweeps: Sequence[LayerwisePass], title: str = "blocks"
) -> Iterator[list[PreparedPrompts]]:
    """Inside, all blocks are run for these lists of prompts, in one go, and the head is in memory."""
    head = outer_parameters(subject, head=True)
    with _table_kept(subject):
        _through_blocks(subject, sweeps, subject.n_layers, ignore_layer, title)
        with subject.offloaded.load_block(head):
            yield [sweep.prompts(subject.n_layers) for sweep in sweeps]


@contextmanager
def _table_kept(subject: Subject) -> Iterator[None]:
    """Inside, a table that is embedding and head is in memory, if it takes little of what is free: else it is read
    twice."""
    shelf, names = subject.offloaded, outer_parameters(subject)
    small = shelf.memory_bytes(names) <= SHARE * free_memory(subject)
    with shelf.keep_in_memory(names) if shelf.tied and small else nullcontext():
        yield


def _through_blocks(subject: Subject, sweeps: Sequence[LayerwisePass], top: int, look: Look, title: str) -> None:
    """While a block computes the next one is read. Tables are not read ahead: they may be larger than two blocks."""
    own = [block_parameters(subject, block) for block in range(top)]
    stations = [(outer_parameters(subject), ()), *zip(own, [*own[1:], ()], strict=False)]
    rows = sum(sweep.n for sweep in sweeps)
    with torch.inference_mode(), progress(title, (top + 1) * rows) as advance:
        for stream, (names, then) in enumerate(stations):
            with subject.offloaded.load_block(names, then):
                for sweep in sweeps:
                    sweep.run(stream, look, advance)
            trim_heap()  # glibc holds on to some 10 MB of freed memory more with each block


def block_parameters(subject: Subject, block: int) -> tuple[str, ...]:
    """The parameters of a block."""
    start = f"{subject.layers}.{block}."
    return tuple(name for name, _ in subject.model.named_parameters() if name.startswith(start))


def outer_parameters(subject: Subject, head: bool = False) -> tuple[str, ...]:
    """The table of embeddings, or that of the head."""
    path = find_end_paths(subject.model)[head]
    return tuple(f"{path}.{name}" for name, _ in subject.module(path).named_parameters())


class LayerwisePass:
    """Rows on their way through the blocks. The prefix that all share is one more row for each variant.

    The stream between two blocks is spilled to disk where it outgrows the budget.
    """

    def __init__(self, subject: Subject, ids: Ids, leave: int = 1) -> None:
        """leave: tokens of each row that no shared prefix may take."""
        self.subject, self.kinds = subject, all_variants()
        self.own = variants_of(len(ids))
        self.skipped = (
            shared_prefix_length(ids, leave) if has_full_attention(subject) and not is_recurrent(subject) else 0
        )
        prefix = [ids[0][: self.skipped]] * len(self.kinds) if self.skipped else []
        self.rows: Ids = [*(row[self.skipped :] for row in ids), *prefix]
        self.n = len(ids)
        size = token_budget(subject, state_bytes(subject))
        self.batches = make_batches([len(row) for row in self.rows[: self.n]], size)
        self.layout = _layout([len(row) for row in self.rows], [*self.batches, list(range(self.n, len(self.rows)))])
        self.stream = allocate_rows(subject, self.layout.tokens, subject.width, subject.model.dtype)
        self.tuples = False

    def prompts(self, top: int) -> PreparedPrompts:
        """What was given, as far as it was run."""
        return PreparedPrompts(self.rows[: self.n], self.skipped, None, self._lower(top + 1, range(self.n)), self.own)

    def run(self, stream: int, look: Look, advance: Callable[[int], None]) -> None:
        """Make the stream ℓ of all rows from ℓ − 1; at 0, from their tokens."""
        prefix = self._prefix(stream) if self.skipped else None
        for batch in self.batches:
            for done in run_or_halve(lambda rows: self._pass(stream, rows, prefix, look), batch):
                advance(done)

    def _prefix(self, stream: int) -> KeyValues:
        """Keys and values of the prefix in the block that runs, for each variant."""
        cache: Any = DynamicCache()
        rows = list(range(self.n, len(self.rows)))
        held = PreparedPrompts([self.rows[i] for i in rows], 0, None, self._lower(stream, rows), tuple(self.kinds))
        self._through(stream, held, rows, cache, ignore_layer)
        return [(layer.keys, layer.values) for layer in cache.layers[stream - 1 : stream]]

    def _pass(self, stream: int, rows: list[int], prefix: KeyValues | None, look: Look) -> int:
        # Of the blocks' caches only this block's is used; the others tell how long the prefix is.
        states = prefix * self.subject.n_layers if prefix else None
        held = replace(self.prompts(stream - 1), prefix=states).of(rows)
        self._through(stream, held, rows, held.cache(range(len(rows))), look)
        return len(rows)

    def _lower(self, stream: int, rows: Sequence[int]) -> ResumePoint | None:
        """What the stream ℓ of these rows is made from; None at 0."""
        if not stream:
            return None
        return ResumePoint(
            self.subject, stream - 1, self.layout, self.stream, PackedRows.of([0]), [], self.tuples, tuple(rows)
        )

    def _through(self, stream: int, held: PreparedPrompts, rows: list[int], cache: Any, look: Look) -> None:
        """One pass over the rows through one block. It ends there, whoever looks."""
        ids, lengths = pad_rows(held.rows, self.subject.device)
        hooks = self._keeping(stream, rows), look(stream, rows, lengths), _ending(self.subject, stream)
        with hooks[0], hooks[1], hooks[2], held.around(range(len(rows))):  # in the order in which they are to see it
            run_backbone(self.subject, ids, held.skipped, cache, held.lower)

    @contextmanager
    def _keeping(self, stream: int, rows: list[int]) -> Iterator[None]:
        """Inside, what the block gives is kept in place of what it was given."""

        def enters(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.layout.put(self.stream, rows, args[0] if args else kwargs["hidden_states"])

        def leaves(module: nn.Module, args: tuple[Any, ...], states: Any) -> None:
            self.tuples = isinstance(states, tuple)
            self.layout.put(self.stream, rows, states[0] if self.tuples else states)

        layers = decoder_blocks(self.subject)
        first = layers[0].register_forward_pre_hook(enters, with_kwargs=True) if not stream else None
        handle = first or layers[stream - 1].register_forward_hook(leaves)
        try:
            yield
        except DoneError:
            pass
        finally:
            handle.remove()


@contextmanager
def _ending(subject: Subject, stream: int) -> Iterator[None]:
    """Inside, a pass ends once the stream ℓ is there: hooks set before see it."""

    def done(*given: Any) -> None:
        raise DoneError

    layers = decoder_blocks(subject)
    module = layers[stream - 1] if stream else layers[0]
    handle = module.register_forward_hook(done) if stream else module.register_forward_pre_hook(done)
    try:
        yield
    finally:
        handle.remove()


def _layout(lengths: Sequence[int], batches: Sequence[Sequence[int]]) -> PackedRows:
    """The tokens of a batch lie in a row, so that they are read and written in one go."""
    order = torch.tensor(list(chain.from_iterable(batches)))
    sizes = torch.tensor(lengths)
    starts = torch.empty_like(sizes)
    starts[order] = sizes[order].cumsum(0) - sizes[order]
    return PackedRows(starts, sizes)
