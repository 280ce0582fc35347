"""Memory of passes with gradients: how many prompts fit one pass, and recomputing blocks if not even one fits."""

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
from obliteratus.inference.batching import bytes_per_token
from obliteratus.inference.hooks import decoder_blocks
from obliteratus.inference.memory import free_memory

MEMORY_SHARE = 0.5  # of the free memory; the rest is for what the estimate leaves out, and for other processes
LOGIT_COPIES = 4  # copies of an answer token's logits: raw, as log-probabilities, the base model's, and the gradient


@dataclass(frozen=True)
class GradientMemory:
    """How passes with gradients are run."""

    rows: int
    """Prompts per pass."""
    first: int
    """Lowest edited block. Blocks below it keep no graph."""
    recompute: bool
    """Whether blocks keep only their inputs and run again in the backward pass."""


def plan_gradient_memory(
    subject: Subject, pairs: Sequence[Pair], first: int, max_rows: int, free: int = 0
) -> GradientMemory:
    """Return as many rows per pass, at most ``max_rows``, as half of the free memory holds with their graph.

    If it does not hold even one, the result is one row with recomputed blocks. free: bytes; 0 asks the device.
    """
    tokens, answer = max(len(p) + len(a) for p, a in pairs), max(len(a) for _, a in pairs)
    per_row = estimate_row_bytes(subject, tokens, answer, subject.n_layers - first)
    fit = int(MEMORY_SHARE * (free or free_memory(subject)) / per_row)
    return GradientMemory(max(1, min(max_rows, fit)), first, fit < 1)


def estimate_row_bytes(subject: Subject, tokens: int, answer: int, layers: int) -> float:
    """Return the bytes of one row's graph: ``tokens`` through ``layers`` blocks, logits of ``answer`` tokens."""
    vocabulary = int(subject.model.get_output_embeddings().weight.shape[0])
    return tokens * layers * bytes_per_token(subject) + LOGIT_COPIES * 4.0 * answer * vocabulary  # 4: bytes of fp32


@contextmanager
def recompute_blocks(subject: Subject, memory: GradientMemory) -> Iterator[None]:
    """Inside, edited blocks run again in the backward pass if ``memory.recompute`` is set.

    The backward pass must be inside as well, under the same edits as the forward pass.
    """
    blocks = decoder_blocks(subject)[memory.first :] if memory.recompute else []
    own = [vars(block).get("forward") for block in blocks]
    for block in blocks:
        _set_forward(block, partial(_checkpointed, block.forward))
    try:
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            _set_forward(block, forward)


def _set_forward(block: nn.Module, forward: Callable[..., Any] | None) -> None:
    """Override the class's forward on this module; None removes the override."""
    if forward is None:
        vars(block).pop("forward")
    else:
        vars(block)["forward"] = forward


def _checkpointed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run with checkpointing, except in passes that fill a KV cache: a second run would fill it again.

    Only the shared prefix does so; it is one row, and keeps its graph.
    """
    if any(isinstance(x, DynamicCache) for x in (*args, *kwargs.values())):
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
