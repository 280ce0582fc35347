"""What the lower blocks gave, kept within a byte budget for later passes: the stream at a few cuts, keys and values."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from obliteratus.core.types import Subject
from obliteratus.inference.batching import make_batches, pad_rows, run_or_halve, token_budget
from obliteratus.inference.chat_template import Ids
from obliteratus.inference.generate import kv_bytes
from obliteratus.inference.hooks import DoneError, decoder_blocks
from obliteratus.inference.kv_cache import KeyValues
from obliteratus.inference.resume import PackedRows, ResumePoint
from obliteratus.inference.shared_prefix import PreparedPrompts, run_backbone

# Cuts lie at eighths of the depth. A pass then runs on average a sixteenth of the blocks more than it must, and each
# cut costs the stream of all prompts (SmolLM2, 96 prompts of 20 tokens of their own: 4.5 MB).
CUTS = 8


class LayerCache:
    """The stream that enters some blocks (the cuts), and keys and values of the blocks below the highest cut.

    The prefix that all prompts share is one more row, the last. Its keys and values are in ``prompts`` already.
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
        """budget: bytes. answers: rows whose keys and values are kept. depths: blocks at which cuts may lie, rising; by
        default eighths of the depth."""
        self.subject, self.prompts = subject, prompts
        self.ids: Ids = [*prompts.rows, prefix] if prefix else prompts.rows
        kept = set(answers)
        self.layout = PackedRows.from_lengths([len(row) for row in self.ids])
        self.kv_layout = PackedRows.from_lengths([len(row) if i in kept else 0 for i, row in enumerate(self.ids)])
        self.cuts = self._affordable_cuts(budget, depths or evenly_spaced_cuts(subject.n_layers))
        self.streams: dict[int, Tensor] = {}
        self.key_values: KeyValues = []
        self.returns_tuple: dict[int, bool] = {}
        """Cut → whether the block below it returns a tuple that begins with the stream."""
        self.checked = False
        """Whether passes that begin at a cut were compared with whole ones."""

    def bytes_held(self) -> int:
        """Return the bytes of what is kept now."""
        tensors = [*self.streams.values(), *(x for pair in self.key_values for x in pair)]
        return sum(x.nbytes for x in tensors)

    def bytes_needed(self, cuts: Sequence[int]) -> float:
        """Return the bytes that these cuts take: the stream at each, and keys and values up to the highest."""
        streams = len(cuts) * self.layout.tokens * self.subject.width * self.subject.model.dtype.itemsize
        key_values = max(cuts, default=0) * self.kv_layout.tokens * kv_bytes(self.subject) / self.subject.n_layers
        return float(streams + key_values)

    def resume_point(self, cut: int) -> ResumePoint | None:
        """Return where passes resume at this cut, or None at cut 0. The blocks below run now if they have not yet."""
        if not cut:
            return None
        if cut not in self.streams:
            self._run_to(cut)
        return ResumePoint(
            self.subject,
            cut,
            self.layout,
            self.streams[cut],
            self.kv_layout,
            self.key_values[:cut],
            self.returns_tuple[cut],
            rows=tuple(range(len(self.ids))),
        )

    def clear(self) -> None:
        """Drop what is kept, and all cuts."""
        self.cuts, self.streams, self.key_values = (), {}, []

    def _affordable_cuts(self, budget: float, depths: Sequence[int]) -> tuple[int, ...]:
        """Return the lowest depths, as many as the budget allows together, since any of them may be asked for."""
        return tuple(c for i, c in enumerate(depths) if self.bytes_needed(depths[: i + 1]) <= budget)

    # ---------------------------------------------------------------------------------------- running
    @torch.no_grad()
    def _run_to(self, cut: int) -> None:
        """Run the blocks up to this cut, from the highest cut below it that is kept, and keep what they give."""
        below = self.resume_point(max((c for c in self.streams if c < cut), default=0))
        stores: list[Tensor] = []
        for prompts, batch in self._batches(below):
            for rows, values in run_or_halve(self._make_runner(prompts, cut), batch):
                layouts = [self.layout, *[self.kv_layout] * (len(values) - 1)]
                stores = stores or [x.new_empty(y.tokens, *x.shape[2:]) for x, y in zip(values, layouts, strict=True)]
                for store, layout, x in zip(stores, layouts, values, strict=True):
                    layout.write(store, rows, x)
        self.streams[cut] = stores[0]
        self.key_values += list(zip(stores[1::2], stores[2::2], strict=True))

    def _batches(self, below: ResumePoint | None) -> Iterator[tuple[PreparedPrompts, list[int]]]:
        """Yield batches of all rows behind their prefix, then the prefix alone."""
        prompts = replace(self.prompts, resume_from=below)
        budget = token_budget(self.subject)
        yield from ((prompts, rows) for rows in make_batches([len(row) for row in self.prompts.rows], budget))
        if self.prompts.prefix_length:
            yield PreparedPrompts(self.ids, 0, None, below), [len(self.prompts.rows)]

    def _make_runner(self, prompts: PreparedPrompts, cut: int) -> Callable[[list[int]], tuple[list[int], list[Tensor]]]:
        """Return a function that runs rows and gives [rows, tokens, …] tensors: the stream that enters block ``cut``,
        then keys and values of the blocks that have none yet."""

        def run(rows: list[int]) -> tuple[list[int], list[Tensor]]:
            ids, _ = pad_rows([prompts.rows[i] for i in rows], self.subject.device)
            cache = _make_full_cache(prompts, rows)
            with self._capture_input(cut) as stream, prompts.pass_over(rows):
                run_backbone(self.subject, ids, prompts.prefix_length, cache)
            new = cache.layers[len(self.key_values) : cut] if self.kv_layout.tokens else []
            states = (x[:, :, prompts.prefix_length :] for layer in new for x in (layer.keys, layer.values))
            return rows, [*stream, *(x.transpose(1, 2) for x in states)]

        return run

    @contextmanager
    def _capture_input(self, cut: int) -> Iterator[list[Tensor]]:
        """Append the stream that enters this block to the list that the context gives, and end the pass there."""
        stream: list[Tensor] = []

        def on_output_below(module: nn.Module, args: tuple[Any, ...], states: Any) -> None:
            self.returns_tuple[cut] = isinstance(states, tuple)

        def on_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            stream.append(args[0] if args else kwargs["hidden_states"])
            raise DoneError

        blocks = decoder_blocks(self.subject)
        handles = [blocks[cut - 1].register_forward_hook(on_output_below)]
        handles.append(blocks[cut].register_forward_pre_hook(on_input, with_kwargs=True, prepend=True))
        try:
            yield stream
        except DoneError:
            pass
        finally:
            for handle in handles:
                handle.remove()


def evenly_spaced_cuts(n_layers: int) -> list[int]:
    """Return cuts that divide the blocks into eighths, as nearly as possible."""
    return sorted({n_layers * i // CUTS for i in range(1, CUTS)} - {0})


def _make_full_cache(prompts: PreparedPrompts, rows: list[int]) -> Any:
    """Return a cache that keeps what is appended to the prefix."""
    cache: Any = DynamicCache()
    for i, (keys, values) in enumerate(prompts.expand_prefix(rows)):
        cache.update(keys, values, i)
    return cache
