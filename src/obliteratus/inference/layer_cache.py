"""What is kept of the lower blocks: the stream at a few cuts, and keys and values, within a byte budget."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from obliteratus.core.types import Subject
from obliteratus.inference.batching import make_batches, pad_rows, run_or_halve, state_bytes, token_budget
from obliteratus.inference.chat_template import Ids
from obliteratus.inference.generate import kv_bytes
from obliteratus.inference.hooks import DoneError, decoder_blocks
from obliteratus.inference.kv_cache import KeyValues
from obliteratus.inference.resume import PackedRows, ResumePoint
from obliteratus.inference.shared_prefix import PreparedPrompts, run_backbone

# Cuts lie at eighths of the depth: an edit begins on average a sixteenth of the blocks above one, and each costs the
# stream of all prompts (SmolLM2, 96 prompts of 20 tokens of their own: 4.5 MB).
CUTS = 8


class LayerCache:
    """The stream that enters some blocks, and keys and values of the blocks below the highest of them.

    The prefix that all prompts share is one more row, the last: its keys and values are in ``prompts`` already.
    """

    def __init__(
        self,
        subject: Subject,
        prompts: PreparedPrompts,
        prefix: list[int],
        budget: float,
        answers: Collection[int],
        depths: Sequence[int] = (),
    ) -> None:
        """budget: bytes. answers: the rows of which keys and values are wanted. depths: where cuts may lie, rising; by
        default at eighths of the depth."""
        self.subject, self.prompts, wanted = subject, prompts, set(answers)
        self.ids: Ids = [*prompts.rows, prefix] if prefix else prompts.rows
        self.layout = PackedRows.of([len(row) for row in self.ids])
        self.answered = PackedRows.of([len(row) if i in wanted else 0 for i, row in enumerate(self.ids)])
        self.cuts = self._affordable(budget, depths or eighths(subject.n_layers))
        self.streams: dict[int, Tensor] = {}
        self.states: KeyValues = []
        self.tuples: dict[int, bool] = {}
        """By cut, whether the block below it returns a tuple that begins with the stream."""
        self.lock = RLock()
        self.checked = False
        """Whether passes that begin at a cut were compared with whole ones: once, for all copies of a trunk."""

    def on(self, twin: Subject) -> LayerCache:
        """The same for a twin of the model, which another thread edits: a cut is run by whoever asks for it first."""
        other = copy(self)
        other.subject = twin
        return other

    def bytes_held(self) -> int:
        """Bytes of what is kept now."""
        kept = [*self.streams.values(), *(x for pair in self.states for x in pair)]
        return sum(x.nbytes for x in kept)

    def bytes_needed(self, cuts: Sequence[int]) -> float:
        """Bytes that these cuts take: the stream at each, and keys and values up to the highest."""
        streams = len(cuts) * self.layout.tokens * self.subject.width * self.subject.model.dtype.itemsize
        states = max(cuts, default=0) * self.answered.tokens * kv_bytes(self.subject) / self.subject.n_layers
        return float(streams + states)

    def lower(self, cut: int) -> ResumePoint | None:
        """The blocks below this cut, which are run now if they were not before; None at cut 0."""
        if not cut:
            return None
        with self.lock:
            if cut not in self.streams:
                self._keep(cut)
        rows = tuple(range(len(self.ids)))
        states = self.states[:cut]
        return ResumePoint(
            self.subject, cut, self.layout, self.streams[cut], self.answered, states, self.tuples[cut], rows
        )

    def drop(self) -> None:
        """Keep nothing, and have no cuts."""
        self.cuts, self.streams, self.states = (), {}, []

    def _affordable(self, budget: float, depths: Sequence[int]) -> tuple[int, ...]:
        """Cuts from the lowest up, as far as the budget allows them all: any of them may be asked for."""
        return tuple(c for i, c in enumerate(depths) if self.bytes_needed(depths[: i + 1]) <= budget)

    # ---------------------------------------------------------------------------------------- running
    @torch.no_grad()
    def _keep(self, cut: int) -> None:
        """Run the blocks up to this cut, from the highest kept one below it."""
        lower = self.lower(max((c for c in self.streams if c < cut), default=0))
        stores: list[Tensor] = []
        for prompts, batch in self._sources(lower):
            for rows, values in run_or_halve(self._runner(prompts, cut), batch):
                layouts = [self.layout, *[self.answered] * (len(values) - 1)]
                stores = stores or [x.new_empty(y.tokens, *x.shape[2:]) for x, y in zip(values, layouts, strict=True)]
                for store, layout, x in zip(stores, layouts, values, strict=True):
                    layout.put(store, rows, x)
        self.streams[cut] = stores[0]
        self.states += list(zip(stores[1::2], stores[2::2], strict=True))

    def _sources(self, lower: ResumePoint | None) -> Iterator[tuple[PreparedPrompts, list[int]]]:
        """Batches of all rows, behind their prefix; then the prefix by itself."""
        behind = replace(self.prompts, lower=lower)
        size = token_budget(self.subject, state_bytes(self.subject))
        yield from ((behind, rows) for rows in make_batches([len(row) for row in self.prompts.rows], size))
        if self.prompts.skipped:
            yield PreparedPrompts(self.ids, 0, None, lower), [len(self.prompts.rows)]

    def _runner(self, prompts: PreparedPrompts, cut: int) -> Callable[[list[int]], tuple[list[int], list[Tensor]]]:
        """Gives the stream that enters block ``cut``, and keys and values of blocks not kept yet: [rows, tokens, …]."""

        def run(rows: list[int]) -> tuple[list[int], list[Tensor]]:
            ids, _ = pad_rows([prompts.rows[i] for i in rows], self.subject.device)
            cache = _keeping(prompts, rows)
            with self._watching(cut) as entered, prompts.around(rows):
                run_backbone(self.subject, ids, prompts.skipped, cache)
            new = cache.layers[len(self.states) : cut] if self.answered.tokens else []
            pairs = [x[:, :, prompts.skipped :].transpose(1, 2) for layer in new for x in (layer.keys, layer.values)]
            return rows, [*entered, *pairs]

        return run

    @contextmanager
    def _watching(self, cut: int) -> Iterator[list[Tensor]]:
        """Inside, the stream that enters this block is kept, and the pass ends there."""
        entered: list[Tensor] = []

        def left(module: nn.Module, args: tuple[Any, ...], states: Any) -> None:
            self.tuples[cut] = isinstance(states, tuple)

        def enters(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            entered.append(args[0] if args else kwargs["hidden_states"])
            raise DoneError

        layers = decoder_blocks(self.subject)
        handles = [layers[cut - 1].register_forward_hook(left)]
        handles.append(layers[cut].register_forward_pre_hook(enters, with_kwargs=True, prepend=True))
        try:
            yield entered
        except DoneError:
            pass
        finally:
            for handle in handles:
                handle.remove()


def eighths(n_layers: int) -> list[int]:
    """Cuts that part the blocks into eighths, as nearly as they can be."""
    return sorted({n_layers * i // CUTS for i in range(1, CUTS)} - {0})


def _keeping(prompts: PreparedPrompts, rows: list[int]) -> Any:
    """A cache that holds on to what is appended to the prefix."""
    cache: Any = DynamicCache()
    for i, (keys, values) in enumerate(prompts.prefix_of(rows)):
        cache.update(keys, values, i)
    return cache
