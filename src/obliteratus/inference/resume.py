"""What the lower blocks gave for each token of many rows: put in place of running them again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from obliteratus.core.shapes import Float, Int
from obliteratus.core.types import Subject
from obliteratus.inference.hooks import decoder_blocks
from obliteratus.inference.kv_cache import KeyValues
from obliteratus.inference.spill import SpilledRows


@dataclass(frozen=True)
class PackedRows:
    """Where each row's tokens lie, all rows one after the other without padding. A row of length 0 is not there."""

    starts: Int[Tensor, " rows"]
    lengths: Int[Tensor, " rows"]

    @classmethod
    def of(cls, lengths: Sequence[int]) -> PackedRows:
        sizes = torch.tensor(lengths)
        return cls(sizes.cumsum(0) - sizes, sizes)

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())

    def places(self, rows: Sequence[int]) -> Int[Tensor, "batch longest"]:
        """Token numbers of some rows side by side; a shorter row's last token fills it up, as padding nobody sees."""
        chosen = torch.tensor(list(rows))
        steps = torch.arange(int(self.lengths[chosen].max()))
        return self.starts[chosen][:, None] + torch.minimum(steps[None], self.lengths[chosen][:, None] - 1)

    def put(self, store: Tensor | SpilledRows, rows: Sequence[int], values: Tensor) -> None:
        """Values [batch, longest, …] of some rows into the store [tokens, …], without their padding."""
        places = self.places(rows)
        own = torch.arange(places.shape[1])[None] < self.lengths[torch.tensor(list(rows))][:, None]
        store[places[own].to(store.device)] = values[:, : own.shape[1]][own.to(values.device)]


@dataclass(frozen=True)
class ResumePoint:
    """The blocks below ``cut``, run before: the stream that enters block ``cut``, and their keys and values. At L, the
    number of blocks, it is the stream that leaves the last one."""

    subject: Subject
    cut: int
    layout: PackedRows
    stream: Float[Tensor, "tokens width"] | SpilledRows
    answered: PackedRows
    states: KeyValues
    """Keys and values of each block below the cut, [tokens, heads, head], of rows that are to be answered."""
    tuples: bool = False
    """Whether a block returns a tuple that begins with the stream."""
    rows: tuple[int, ...] = ()
    """Which row of the layout each row is."""

    def of(self, rows: Sequence[int]) -> ResumePoint:
        """The same for these rows, in this order."""
        return replace(self, rows=tuple(self.rows[i] for i in rows))

    @contextmanager
    def entering(self, rows: Sequence[int]) -> Iterator[None]:
        """Inside, a pass over these rows begins at block ``cut``: the blocks below pass on what they are given."""
        layers = decoder_blocks(self.subject)
        places = self.layout.places([self.rows[i] for i in rows])
        states = self.stream[places.to(self.stream.device)]
        handle = _left_by(layers[-1], states) if self.cut == len(layers) else _entered_by(layers[self.cut], states)
        try:
            with skip_blocks(layers[: self.cut], self.tuples):
                yield
        finally:
            handle.remove()

    def fill(self, cache: Any, rows: Sequence[int]) -> None:
        """Give the cache the keys and values of the blocks that do not run."""
        places = self.answered.places([self.rows[i] for i in rows])
        for layer, pair in zip(cache.layers, self.states, strict=False):
            keys, values = (x[places.to(x.device)].transpose(1, 2) for x in pair)
            layer.update(keys, values)


def _entered_by(block: nn.Module, states: Float[Tensor, "rows tokens width"]) -> RemovableHandle:
    """Put these states in place of what the block is given. First of all hooks: others then see what would enter."""

    def put(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        given = args[0] if args else kwargs["hidden_states"]
        kept = states.to(given)
        assert kept.shape == given.shape, "the pass is over other tokens than were kept"
        return ((kept, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": kept})

    return block.register_forward_pre_hook(put, with_kwargs=True, prepend=True)


def _left_by(block: nn.Module, states: Float[Tensor, "rows tokens width"]) -> RemovableHandle:
    """Put these states in place of what the block gives."""

    def put(module: nn.Module, args: tuple[Any, ...], given: Any) -> Any:
        plain = given[0] if isinstance(given, tuple) else given
        kept = states.to(plain)
        return (kept, *given[1:]) if isinstance(given, tuple) else kept

    return block.register_forward_hook(put, prepend=True)


def pass_inputs(subject: Subject, ids: Int[Tensor, "rows tokens"], lower: ResumePoint | None) -> dict[str, Tensor]:
    """What a pass is given: tokens; or nothing but their number, where the stream is known and the table of embeddings
    would have to be read for it."""
    if subject.offloaded is None or lower is None:
        return {"input_ids": ids}
    return {
        "inputs_embeds": torch.zeros((), dtype=subject.model.dtype, device=ids.device).expand(*ids.shape, subject.width)
    }


@contextmanager
def skip_blocks(modules: Sequence[nn.Module], tuples: bool) -> Iterator[None]:
    """Inside, these blocks pass the stream on untouched. Positions, rotary tables and masks are still the model's."""

    def same(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (hidden_states,) if tuples else hidden_states

    own = [vars(module).get("forward") for module in modules]  # offloading sets a forward of its own on a block
    for module in modules:
        vars(module)["forward"] = same
    try:
        yield
    finally:
        for module, forward in zip(modules, own, strict=True):
            if forward is None:
                del vars(module)["forward"]
            else:
                vars(module)["forward"] = forward
