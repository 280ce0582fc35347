"""Steering of a running model: a vector added to the residual stream behind blocks, at every token."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from obliteratus.core.errors import UserError
from obliteratus.core.types import LENGTH, Directions, Subject
from obliteratus.excise.live.hooks import are_edits_paused
from obliteratus.inference.hooks import add_to_output, decoder_blocks

LENGTHS = ("‖Δμ‖", LENGTH)
"""Units of raw scores that are lengths of vectors in the stream."""


@contextmanager
def steer(
    subject: Subject,
    vector: Tensor | Directions | Mapping[int, Tensor],
    strength: float = 1.0,
    layers: int | Collection[int] | None = None,
) -> Iterator[None]:
    """Inside, ``strength × vector`` is added to what blocks leave, at every token; afterwards the model is unchanged.

    vector: a tensor [width], a tensor for each block by its number, or directions, of which the first at each stream is
    added at its raw length. strength: 1 adds the vector as it is, and a negative one subtracts it. layers: numbers of
    blocks, negative ones from the end; None stands for all blocks that have a vector.

    Nothing is added where `without_edits` holds, so a model can still be compared with itself unsteered. Raises
    UserError for a block that does not exist or has no vector, for another width, NaN, and directions whose raw score
    is no length.

    >>> with ob.steer(subject, torch.ones(32), strength=-2.0, layers=[3, 4]):
    ...     answer = ob.generate(subject, "Tell me about tides?")
    """
    vectors = _vectors_by_block(subject, vector)
    chosen = _choose(subject, vectors, layers)
    if not torch.isfinite(torch.tensor(float(strength))):
        raise UserError(f"steer: strength is {strength}; give a finite number")
    blocks = decoder_blocks(subject)
    with ExitStack() as stack:
        for block in chosen:
            added = strength * vectors[block]
            stack.callback(blocks[block].register_forward_hook(_make_hook(added)).remove)
        yield


def _vectors_by_block(subject: Subject, vector: Tensor | Directions | Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Return an fp32 vector for each block that has one. Raises UserError for those that do not fit the model."""
    n = subject.n_layers
    if isinstance(vector, Directions):
        found = _scale_directions(vector, n)
    elif isinstance(vector, Mapping):
        found = {_resolve(subject, block): own for block, own in vector.items()}
    else:
        found = dict.fromkeys(range(n), vector)
    for block, own in found.items():
        if own.shape != (subject.width,):
            raise UserError(
                f"steer: the vector of block {block} has the shape {[*own.shape]}; it must be [{subject.width}]"
            )
        if not torch.isfinite(own).all():
            raise UserError(f"steer: the vector of block {block} holds NaN or Inf; make it again")
    return {block: own.detach().float() for block, own in found.items()}


def _scale_directions(directions: Directions, blocks: int) -> dict[int, Tensor]:
    if directions.unit not in LENGTHS:
        raise UserError(f"steer: the raw score of these directions is in {directions.unit}, no length; give a vector")
    if len(directions.basis) != blocks + 1:
        raise UserError(f"steer: the directions are of {len(directions.basis)} streams, and the model has {blocks + 1}")
    rows = directions.basis[:, 0] * directions.raw[:, None]
    return {block: rows[block + 1] for block in range(blocks) if rows[block + 1].any()}


def _resolve(subject: Subject, block: int) -> int:
    """Return the number of a block that may be counted from the end. Raises UserError if there is none."""
    if not -subject.n_layers <= block < subject.n_layers:
        raise UserError(f"steer: there is no block {block}; the blocks are 0 to {subject.n_layers - 1}")
    return block % subject.n_layers


def _choose(subject: Subject, vectors: Mapping[int, Tensor], layers: int | Collection[int] | None) -> list[int]:
    wanted = [layers] if isinstance(layers, int) else layers
    chosen = [*vectors] if wanted is None else list(dict.fromkeys(_resolve(subject, block) for block in wanted))
    if not chosen:
        raise UserError("steer: no block is chosen; give at least one in layers")
    if missing := [block for block in chosen if block not in vectors]:
        raise UserError(f"steer: block {missing[0]} has no vector; those that have one are {sorted(vectors)}")
    return chosen


def _make_hook(added: Tensor) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return output if are_edits_paused() else add_to_output(output, added)

    return hook
