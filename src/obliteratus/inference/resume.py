"""Passes that begin at a middle block: what the blocks below gave in an earlier pass is put in their place."""

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
    """Layout of a store [tokens, …] that holds the tokens of all rows without padding. A row of length 0 is absent."""

    starts: Int[Tensor, " rows"]
    lengths: Int[Tensor, " rows"]

    @classmethod
    def from_lengths(cls, lengths: Sequence[int]) -> PackedRows:
        """Return a layout with the rows one after the other."""
        sizes = torch.tensor(lengths)
        return cls(sizes.cumsum(0) - sizes, sizes)

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())

    def token_indices(self, rows: Sequence[int]) -> Int[Tensor, "batch longest"]:
        """Return where the tokens of some rows lie. A shorter row is padded with its last token, which nobody sees."""
        chosen = torch.tensor(list(rows))
        steps = torch.arange(int(self.lengths[chosen].max()))
        return self.starts[chosen][:, None] + torch.minimum(steps[None], self.lengths[chosen][:, None] - 1)

    def write(self, store: Tensor | SpilledRows, rows: Sequence[int], values: Tensor) -> None:
        """Write padded values [batch, longest, …] of some rows into the store, without their padding."""
        indices = self.token_indices(rows)
        real = torch.arange(indices.shape[1])[None] < self.lengths[torch.tensor(list(rows))][:, None]
        store[indices[real].to(store.device)] = values[:, : real.shape[1]][real.to(values.device)]


@dataclass(frozen=True)
class ResumePoint:
    """What a pass needs to begin at block ``cut``: the stream that enters it, and keys and values of the blocks below.
    A cut at L, the number of blocks, holds the stream that leaves the last one."""

    subject: Subject
    cut: int
    layout: PackedRows
    """Layout of ``stream``."""
    stream: Float[Tensor, "tokens width"] | SpilledRows
    kv_layout: PackedRows
    """Layout of ``key_values``, in which only rows that are to be answered are present."""
    key_values: KeyValues
    """Keys and values [tokens, heads, head] of each block below the cut."""
    returns_tuple: bool = False
    """Whether a block returns a tuple that begins with the stream."""
    rows: tuple[int, ...] = ()
    """Row of the layouts that each prompt is."""

    def select(self, rows: Sequence[int]) -> ResumePoint:
        """Return the same for these rows, in this order."""
        return replace(self, rows=tuple(self.rows[i] for i in rows))

    @contextmanager
    def resume(self, rows: Sequence[int]) -> Iterator[None]:
        """Let a pass over these rows begin at block ``cut``. The blocks below return what they are given."""
        blocks = decoder_blocks(self.subject)
        indices = self.layout.token_indices([self.rows[i] for i in rows])
        states = self.stream[indices.to(self.stream.device)]
        at_end = self.cut == len(blocks)
        handle = _replace_output(blocks[-1], states) if at_end else _replace_input(blocks[self.cut], states)
        try:
            with skip_blocks(blocks[: self.cut], self.returns_tuple):
                yield
        finally:
            handle.remove()

    def fill_cache(self, cache: Any, rows: Sequence[int]) -> None:
        """Give the cache the keys and values of the blocks that do not run."""
        indices = self.kv_layout.token_indices([self.rows[i] for i in rows])
        for layer, pair in zip(cache.layers, self.key_values, strict=False):
            keys, values = (x[indices.to(x.device)].transpose(1, 2) for x in pair)
            layer.update(keys, values)


def _replace_input(block: nn.Module, states: Float[Tensor, "rows tokens width"]) -> RemovableHandle:
    """Hook that puts these states in place of the block's input. It runs first, so that other hooks see them."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        replaced = args[0] if args else kwargs["hidden_states"]
        new = states.to(replaced)
        assert new.shape == replaced.shape, "the pass runs over other tokens than the stored ones"
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

    return block.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)


def _replace_output(block: nn.Module, states: Float[Tensor, "rows tokens width"]) -> RemovableHandle:
    """Hook that puts these states in place of the block's output."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple):
            return (states.to(output[0]), *output[1:])
        return states.to(output)

    return block.register_forward_hook(hook, prepend=True)


def pass_inputs(
    subject: Subject, ids: Int[Tensor, "rows tokens"], resume_from: ResumePoint | None
) -> dict[str, Tensor]:
    """Return a pass's input: the tokens, or embeddings of zeros where the stream is known and the embedding table would
    have to be read from disk for nothing."""
    if subject.offloaded is None or resume_from is None:
        return {"input_ids": ids}
    zero = torch.zeros((), dtype=subject.model.dtype, device=ids.device)
    return {"inputs_embeds": zero.expand(*ids.shape, subject.width)}


@contextmanager
def skip_blocks(blocks: Sequence[nn.Module], returns_tuple: bool) -> Iterator[None]:
    """Let these blocks return the stream unchanged. Positions, rotary tables and masks are still the model's."""

    def identity(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (hidden_states,) if returns_tuple else hidden_states

    originals = [vars(block).get("forward") for block in blocks]  # offloading sets a forward of its own on a block
    for block in blocks:
        vars(block)["forward"] = identity
    try:
        yield
    finally:
        for block, forward in zip(blocks, originals, strict=True):
            if forward is None:
                del vars(block)["forward"]
            else:
                vars(block)["forward"] = forward
