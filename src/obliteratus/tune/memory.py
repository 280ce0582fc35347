"""What a pass with gradients holds, how many prompts of it fit, and what to do where not one does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import DynamicCache

from obliteratus.causal.interventions import Pair
from obliteratus.core.types import Subject
from obliteratus.inference.batching import state_bytes
from obliteratus.inference.hooks import decoder_blocks
from obliteratus.inference.memory import free_memory

SHARE = 0.5  # of the free memory: the rest is for what the estimate leaves out, and for others
LOGITS = 4  # copies of an answer token's logits: as they are, as log-probabilities, the base's, and their gradient


@dataclass(frozen=True)
class GradientMemory:
    """How passes with gradients are made."""

    rows: int
    """Prompts of one pass."""
    first: int
    """The block below which nothing is edited: no gradient is kept there."""
    recompute: bool
    """Whether blocks keep only what enters them and run again on the way back."""


def plan_gradient_memory(
    subject: Subject, pairs: Sequence[Pair], first: int, most: int, free: int = 0
) -> GradientMemory:
    """As many rows, at most ``most``, as half of the free memory holds with their graph; 1 and recomputing where
    it holds not even that. free: bytes; 0 asks the device."""
    tokens, answer = max(len(p) + len(a) for p, a in pairs), max(len(a) for _, a in pairs)
    each = row_bytes(subject, tokens, answer, subject.n_layers - first)
    fit = int(SHARE * (free or free_memory(subject)) / each)
    return GradientMemory(max(1, min(most, fit)), first, fit < 1)


def row_bytes(subject: Subject, tokens: int, answer: int, layers: int) -> float:
    """Bytes that a row's graph holds: ``tokens`` through ``layers`` blocks, and the logits of ``answer`` tokens."""
    vocabulary = int(subject.model.get_output_embeddings().weight.shape[0])
    return tokens * layers * state_bytes(subject) + LOGITS * 4.0 * answer * vocabulary  # 4: bytes of fp32


@contextmanager
def recompute_blocks(subject: Subject, room: GradientMemory) -> Iterator[None]:
    """Inside, blocks from ``room.first`` on run twice where the room says so: forward, and on the way back.

    The way back must be inside too, and inside the edits that the way forward saw.
    """
    watched = decoder_blocks(subject)[room.first :] if room.recompute else []
    own = [vars(block).get("forward") for block in watched]
    for block in watched:
        _give(block, partial(_twice, block.forward))
    try:
        yield
    finally:
        for block, forward in zip(watched, own, strict=True):
            _give(block, forward)


def _give(block: nn.Module, forward: Callable[..., Any] | None) -> None:
    """Put a forward before the class's own, or take it off again."""
    if forward is None:
        vars(block).pop("forward")
    else:
        vars(block)["forward"] = forward


def _twice(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A pass that fills a cache would fill it again: that of a shared beginning, one row, keeps its graph."""
    if any(isinstance(x, DynamicCache) for x in (*args, *kwargs.values())):
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
