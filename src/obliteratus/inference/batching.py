"""Batches: how rows of tokens are grouped, how large a batch may be, and what happens when memory runs out.

Batching changes no result: any batch size, order of prompts and padding side of the tokenizer gives what one prompt at
a time gives. Rows are padded on the right and attention is causal, so no token sees padding.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import torch
from torch import Tensor

from obliteratus.core.types import Subject
from obliteratus.inference.chat_template import Ids
from obliteratus.inference.hooks import decoder_blocks
from obliteratus.inference.memory import free_memory
from obliteratus.weights.bitsandbytes import unpacked_shape
from obliteratus.weights.devices import in_process_group

T = TypeVar("T")
# Tokens of one batch on a CPU: enough rows for matrix products to run at full rate, and few enough for the activations
# to stay in the last-level cache (docs/experiments/speed.md, "How many tokens a pass").
CPU_TOKENS = 512
BATCH_TOKENS: ContextVar[int] = ContextVar("tokens of one batch", default=0)


def make_batches(lengths: Sequence[int], budget: int, most: int = sys.maxsize) -> list[list[int]]:
    """Return row numbers by batch, longest rows first. A batch has at most ``most`` rows and at most ``budget`` tokens
    with padding, or a single row."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= budget and len(batches[-1]) < most:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


@contextmanager
def tokens_per_batch(tokens: int) -> Iterator[None]:
    """Limit batches inside the context to so many tokens, or one row. 0 lets memory and cache decide."""
    token = BATCH_TOKENS.set(tokens)
    try:
        yield
    finally:
        BATCH_TOKENS.reset(token)


def token_budget(subject: Subject) -> int:
    """Return how many tokens a batch may have: what fits into half of the free memory, and on a CPU into the cache."""
    if BATCH_TOKENS.get():
        return BATCH_TOKENS.get()
    fit = max(1, int(0.5 * free_memory(subject) / bytes_per_token(subject)))
    return fit if subject.device.type == "cuda" else min(CPU_TOKENS, fit)


def bytes_per_token(subject: Subject) -> float:
    """Return the working memory of one token in a forward pass, in bytes."""
    longest_side = max(max(unpacked_shape(p)) for p in decoder_blocks(subject)[0].parameters())
    return token_bytes(subject.width, longest_side)


def token_bytes(width: int, longest_side: int) -> float:
    """Return `bytes_per_token` from sizes alone. longest_side: of the matrices of a block."""
    return float(4 * (8 * width + 4 * longest_side))  # fp32; about 8 + 4 tensors live at a block's peak


def run_or_halve(run: Callable[[list[int]], T], rows: list[int]) -> Iterator[T]:
    """Run a batch and yield its result. If memory runs out, run its halves instead and yield theirs."""
    try:
        result = run(rows)
    except torch.OutOfMemoryError:
        if len(rows) == 1 or in_process_group():
            raise
        middle = len(rows) // 2
        yield from run_or_halve(run, rows[:middle])
        yield from run_or_halve(run, rows[middle:])
        return
    yield result


def pad_rows(ids: Ids, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return right-padded ids [rows, longest] and lengths [rows]. The padding id is 0, which no token sees."""
    rows = [torch.tensor(row) for row in ids]
    lengths = torch.tensor([len(row) for row in ids], device=device)
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device), lengths
