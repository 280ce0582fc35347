"""What one prompt at a time gives, by plain calls of the model without any of our code: the reference of batching."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from tests.support.tiny import tiny_subject
from torch import Tensor

from obliteratus.core.types import Plan, Subject
from obliteratus.inference.chat_template import Ids
from obliteratus.inference.hidden_states import read_hidden_states
from obliteratus.inference.hooks import decoder_blocks

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
BUDGETS = [1, 60, 10_000]
shared_subject = cache(tiny_subject)
"""`tiny_subject`, built once; for tests that change nothing of it."""


def rows_of(prefix: int = 12, tails: Sequence[int] = (1, 9, 4, 4, 15, 2), seed: int = 0) -> Ids:
    """Rows of bytes that share their first ``prefix`` tokens, which is more than the tiny models' window of 8."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randint(0, 256, (prefix,), generator=generator).tolist()
    return [shared + torch.randint(0, 256, (n,), generator=generator).tolist() for n in tails]


@contextmanager
def recorded(module: Any) -> Iterator[list[Tensor]]:
    """Collect the outputs of a module inside the context."""
    seen: list[Tensor] = []
    handle = module.register_forward_hook(lambda m, a, y: seen.append(y[0] if isinstance(y, tuple) else y))
    try:
        yield seen
    finally:
        handle.remove()


@torch.no_grad()
def plain_stream(subject: Subject, row: list[int], position: int = -1) -> Tensor:
    """[streams, width] of one prompt: the library's own hidden states, with the last one taken before the norm."""
    with recorded(decoder_blocks(subject)[-1]) as last:
        out = subject.model(input_ids=torch.tensor([row]), output_hidden_states=True)
    states = [*out.hidden_states[: subject.n_layers], last[0]]
    return torch.stack([h[0, max(len(row) + position, 0)] for h in states])


@torch.no_grad()
def plain_logits(subject: Subject, row: list[int]) -> Tensor:
    return subject.model(input_ids=torch.tensor([row])).logits[0]


@torch.no_grad()
def plain_answer(subject: Subject, row: list[int], max_new: int) -> list[int]:
    ids = torch.tensor([row])
    out = subject.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new, do_sample=False, pad_token_id=0
    )
    new = out[0, len(row) :].tolist()
    ends = subject.model.generation_config.eos_token_id
    return new[: new.index(ends)] if ends in new else new


@cache
def expected_streams(name: str) -> Tensor:
    """`plain_stream` of all of `rows_of`."""
    return torch.stack([plain_stream(shared_subject(name), row) for row in rows_of()])


@cache
def expected_logits(name: str) -> list[Tensor]:
    """`plain_logits` of all of `rows_of`."""
    return [plain_logits(shared_subject(name), row) for row in rows_of()]


@cache
def expected_answers(name: str) -> Ids:
    """`plain_answer` of all of `rows_of`, of 8 tokens."""
    return [plain_answer(shared_subject(name), row, 8) for row in rows_of()]


def gathered(subject: Subject, ids: Ids, **options: Any) -> tuple[Tensor, Tensor]:
    """Stream and module outputs of all rows, in their order."""
    batches = list(read_hidden_states(subject, ids, **options))
    order = torch.tensor([i for batch in batches for i in batch.rows]).argsort()
    return torch.cat([batch.stream for batch in batches])[order], torch.cat([batch.outputs for batch in batches])[order]


def above(plan: Plan, layer: int) -> Plan:
    """What a plan edits in this block and higher."""
    return replace(plan, edits=tuple(e for e in plan.edits if e.site.layer >= layer))


@contextmanager
def memory_for(subject: Subject, rows: int) -> Iterator[list[int]]:
    """Let the model run out of memory on more rows than this. Gives the sizes that were tried."""
    tried: list[int] = []

    def refuse(module: Any, args: Any, kwargs: Any) -> None:
        tried.append((args[0] if args else kwargs["hidden_states"]).shape[0])
        if tried[-1] > rows:
            raise torch.OutOfMemoryError("planted")

    handle = decoder_blocks(subject)[0].register_forward_pre_hook(refuse, with_kwargs=True)
    try:
        yield tried
    finally:
        handle.remove()
