"""The speed of everything: many prompts in batches, and what passes over them share.

Batching is invisible: any batch size, any order, any padding side of the tokenizer, prefix reused or not, gives
what one prompt at a time gives. Rows are right-padded and attention is causal, so padding is never seen.
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
# Tokens of one batch on a CPU: enough rows for the matrix products to run at full rate, few enough for the
# activations to stay in the last-level cache (docs/experiments/speed.md, "How many tokens a pass").
CPU_TOKENS = 512


# ---------------------------------------------------------------------------------------- batches
def make_batches(lengths: Sequence[int], budget: int, most: int = sys.maxsize) -> list[list[int]]:
    """Row numbers by batch: longest first, at most ``most`` rows and rows × longest ≤ budget (or one row)."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= budget and len(batches[-1]) < most:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


TOKENS: ContextVar[int] = ContextVar("tokens of one batch", default=0)


@contextmanager
def tokens_per_batch(tokens: int) -> Iterator[None]:
    """Inside, a batch holds at most so many tokens, or one row; 0: as memory and cache decide."""
    token = TOKENS.set(tokens)
    try:
        yield
    finally:
        TOKENS.reset(token)


def token_budget(subject: Subject, bytes_per_token: float) -> int:
    """Tokens of one batch: follows free memory (half of it), and on a CPU the cache. Never cuts a prompt."""
    if TOKENS.get():
        return TOKENS.get()
    fit = max(1, int(0.5 * free_memory(subject) / bytes_per_token))
    return fit if subject.device.type == "cuda" else min(CPU_TOKENS, fit)


def state_bytes(subject: Subject) -> float:
    """Working memory of one token in a forward pass: the stream, and the widest projections, a few times."""
    inner = max(max(unpacked_shape(p)) for p in decoder_blocks(subject)[0].parameters())
    return token_bytes(subject.width, inner)


def token_bytes(width: int, inner: int) -> float:
    """The same of any model; inner: the longest side of a block's matrices."""
    return float(4 * (8 * width + 4 * inner))  # 4 bytes; about 8 + 4 tensors live at a block's peak


def run_or_halve(run: Callable[[list[int]], T], rows: list[int]) -> Iterator[T]:
    """Run a batch; when memory runs out, run its halves instead."""
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
    """Right-padded ids [rows, longest] and lengths [rows]. The padding id is never seen, so 0 will do."""
    rows = [torch.tensor(row) for row in ids]
    lengths = torch.tensor([len(row) for row in ids], device=device)
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device), lengths
