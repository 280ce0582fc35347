"""Batches hold every row once; running out of memory, live edits and padding change no result."""

from __future__ import annotations

import pytest
import torch
from tests.support.one_at_a_time import (
    CLOSE,
    gathered,
    memory_for,
    plain_answer,
    plain_stream,
    rows_of,
    shared_subject,
)
from tests.support.plans import PlanMaker
from tests.support.tiny import KINDS, tiny_subject

from obliteratus.core.types import PromptSet, Subject
from obliteratus.excise.live.hooks import applied
from obliteratus.inference.batching import make_batches
from obliteratus.inference.chat_template import render_prompts
from obliteratus.inference.generate import generate
from obliteratus.inference.hooks import decoder_blocks
from obliteratus.inference.logits import first_token_log_probs
from obliteratus.inference.token_losses import token_losses


@pytest.fixture(params=KINDS)
def subject(request: pytest.FixtureRequest) -> Subject:
    return shared_subject(request.param)


def test_batches_hold_each_row_once_within_the_budget() -> None:
    lengths = [5, 1, 9, 9, 2, 30, 4]
    groups = make_batches(lengths, 20)
    assert sorted(i for g in groups for i in g) == list(range(7))
    assert all(len(g) == 1 or len(g) * max(lengths[i] for i in g) <= 20 for g in groups)
    assert [5] in groups  # longer than the budget: alone, and whole


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_out_of_memory_halves_the_batch(name: str) -> None:
    subject = tiny_subject(name)
    ids = rows_of()
    calm = (
        gathered(subject, ids, budget=10_000)[0],
        first_token_log_probs(subject, ids, budget=10_000),
        generate(subject, ids, 6),
        token_losses(subject, ids, budget=10_000),
    )
    with memory_for(subject, 2) as tried:
        torch.testing.assert_close(gathered(subject, ids, budget=10_000)[0], calm[0], **CLOSE)
        torch.testing.assert_close(first_token_log_probs(subject, ids, budget=10_000), calm[1], rtol=1e-4, atol=1e-4)
        assert generate(subject, ids, 6) == calm[2]
        for found, expected in zip(token_losses(subject, ids, budget=10_000), calm[3], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert max(tried) == 6


def test_a_single_row_without_memory_is_an_error() -> None:
    subject = tiny_subject("llama")
    with memory_for(subject, 0), pytest.raises(torch.OutOfMemoryError, match="planted"):
        gathered(subject, rows_of(), reuse=False)
    assert not any(b._forward_hooks or b._forward_pre_hooks for b in decoder_blocks(subject))


def test_live_edits_reach_prefix_and_answers(subject: Subject, make_plan: PlanMaker) -> None:
    ids = rows_of(tails=(1, 9, 4))
    plan = make_plan(subject, ("embed", "attn.out", "mlp.out"), strength=2.0)
    before = gathered(subject, ids)[0]
    with applied(subject, plan):
        expected = torch.stack([plain_stream(subject, row) for row in ids])
        answers = [plain_answer(subject, row, 5) for row in ids]
        # Reflection doubles what rounding leaves, and delta nets add it up over tokens: 2e-5 was seen.
        torch.testing.assert_close(gathered(subject, ids)[0], expected, rtol=1e-4, atol=1e-4)
        assert generate(subject, ids, 5) == answers
    assert not torch.allclose(before, expected, **CLOSE)
    assert generate(subject, ids, 5) != answers


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma2"])
def test_padding_side_does_not_matter(name: str, prompts: PromptSet) -> None:
    right, left = (tiny_subject(name, padding_side=side) for side in ("right", "left"))
    ids = [render_prompts(s, prompts["control"]) for s in (right, left)]
    assert ids[0] == ids[1]
    expected = torch.stack([plain_stream(right, row) for row in ids[0]])
    for subject, rows in zip((right, left), ids, strict=True):
        torch.testing.assert_close(gathered(subject, rows)[0], expected, **CLOSE)
        assert generate(subject, rows, 8) == [plain_answer(subject, row, 8) for row in rows]
