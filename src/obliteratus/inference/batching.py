"""The speed of everything: many prompts in batches, and what passes over them share.

Batching is invisible: any batch size, any order, any padding side of the tokenizer, prefix reused or not, gives
what one prompt at a time gives. Rows are right-padded and attention is causal, so padding is never seen.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from obliteratus.core.types import Subject
from obliteratus.inference.chat_template import Ids
from obliteratus.inference.hooks import decoder_blocks
from obliteratus.inference.kv_cache import KeyValues, cache_arguments, expand_variants, prefix_cache
from obliteratus.inference.memory import free_memory
from obliteratus.inference.resume import ResumePoint, pass_inputs
from obliteratus.inference.row_plans import rows_in_pass
from obliteratus.weights.bitsandbytes import unpacked_shape
from obliteratus.weights.devices import in_process_group

T = TypeVar("T")
# Tokens of one batch on a CPU: enough rows for the matrix products to run at full rate, few enough for the
# activations to stay in the last-level cache (docs/experiments/speed.md, "How many tokens a pass").
CPU_TOKENS = 512
# A shared prefix shorter than this saves less than its own pass and the longer attention cost.
MIN_PREFIX = 4


# ---------------------------------------------------------------------------------------- batches
def common_prefix_length(ids: Ids, leave: int = 1) -> int:
    """Number of leading tokens that all rows share; at least ``leave`` tokens of each row are left."""
    first, last = min(ids), max(ids)
    limit = max(0, min(len(row) for row in ids) - leave)
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), limit)
    return min(same, limit)


def shared_prefix_length(ids: Ids, leave: int = 1) -> int:
    """`common_prefix_length`, where it is long enough to be worth a pass of its own; else 0."""
    n = common_prefix_length(ids, leave) if len(ids) > 1 else 0
    return n if n >= MIN_PREFIX else 0


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


# ---------------------------------------------------------------------------------------- prefixes
@dataclass(frozen=True)
class PreparedPrompts:
    """Token rows with their shared prefix taken off and computed."""

    rows: Ids
    skipped: int
    """Length of the prefix that was taken off."""
    prefix: KeyValues | None
    lower: ResumePoint | None = None
    """What the lower blocks gave before, where they need not run."""
    variants: tuple[int, ...] | None = None
    """Under which of several edits each row is; None where all are under the same."""

    def cache(self, rows: Sequence[int]) -> Any:
        """For a pass over these rows; None without a prefix."""
        return prefix_cache(self.prefix_of(rows)) if self.prefix else None

    def prefix_of(self, rows: Sequence[int]) -> KeyValues:
        """The prefix's states for these rows, [rows, heads, tokens, head]."""
        return expand_variants(self.prefix or [], self.variants_of(rows) or [0] * len(rows))

    def variants_of(self, rows: Sequence[int]) -> list[int] | None:
        return None if self.variants is None else [self.variants[i] for i in rows]

    @contextmanager
    def around(self, rows: Sequence[int]) -> Iterator[None]:
        """Around a pass over these rows: known blocks do not run, and hooks know under which edits each row is."""
        with rows_in_pass(self.variants_of(rows)), self.lower.entering(rows) if self.lower else nullcontext():
            yield

    def ends(self) -> list[int]:
        """The shortest and the longest row."""
        return sorted(range(len(self.rows)), key=lambda i: len(self.rows[i]))[:: max(1, len(self.rows) - 1)]

    def of(self, rows: Sequence[int]) -> PreparedPrompts:
        """These rows alone, in this order; one may come several times."""
        chosen, kinds = [self.rows[i] for i in rows], self.variants_of(rows)
        lower = self.lower.of(rows) if self.lower else None
        return replace(self, rows=chosen, lower=lower, variants=None if kinds is None else tuple(kinds))


def run_backbone(subject: Subject, ids: Tensor, start: int, cache: Any, lower: ResumePoint | None = None) -> Any:
    """One pass without the LM head over tokens whose positions begin at ``start``."""
    positions = torch.arange(start, start + ids.shape[1], device=ids.device)[None]
    given = pass_inputs(subject, ids, lower)
    trunk = subject.model.base_model
    return trunk(**given, position_ids=positions, **cache_arguments(trunk, cache))
