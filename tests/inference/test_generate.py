"""Answers are what one prompt at a time gives, whenever rows end and however they are batched."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from tests.support.one_at_a_time import (
    expected_answers,
    expected_logits,
    plain_answer,
    rows_of,
    shared_subject,
)
from tests.support.pairwise import pairwise
from tests.support.tiny import EOS, KINDS, tiny_subject

from obliteratus.core.progress import Reporter, report_to
from obliteratus.core.types import Subject
from obliteratus.inference import batching
from obliteratus.inference import generate as generation
from obliteratus.inference.chat_template import Ids
from obliteratus.inference.generate import generate
from obliteratus.inference.hooks import decoder_blocks
from obliteratus.inference.shared_prefix import is_recurrent


@pytest.fixture(params=KINDS)
def subject(request: pytest.FixtureRequest) -> Subject:
    return shared_subject(request.param)


SIZES = [(1, 256), (30, 4), (10_000, 256)]


@pytest.mark.parametrize(("name", "sizes", "reuse", "step"), pairwise(KINDS, SIZES, (True, False), (1, -1)))
def test_answers_are_one_at_a_time(
    name: str, sizes: tuple[int, int], reuse: bool, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever part of the prompts passes at once, however many rows are written together, and in whatever order."""
    monkeypatch.setattr(batching, "CPU_TOKENS", sizes[0])
    monkeypatch.setattr(generation, "MAX_ROWS", sizes[1])
    assert generate(shared_subject(name), rows_of()[::step], 8, reuse=reuse) == expected_answers(name)[::step]


@pytest.mark.parametrize("tokens", [1, 30, 10_000])
def test_first_logits_come_with_the_answers(subject: Subject, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "CPU_TOKENS", tokens)
    ids, seen = rows_of(), {}
    generate(subject, ids, 1, on_first_logits=lambda rows, logits: seen.update(zip(rows, logits, strict=True)))
    found = torch.stack([seen[i] for i in range(len(ids))])
    expected = torch.stack([logits[-1] for logits in expected_logits(subject.source.id.removeprefix("tiny:"))])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_answers_end_at_the_end_token() -> None:
    subject = tiny_subject("llama")
    ids = rows_of()
    free = generate(subject, ids, 12)
    end = free[1][3]
    subject.model.generation_config.eos_token_id = end
    found = generate(subject, ids, 12)
    assert found == [row[: row.index(end)] if end in row else row for row in free]
    assert found == [plain_answer(subject, row, 12) for row in ids]
    assert len(found[1]) <= 3
    assert any(len(row) == 12 for row in found)  # the others were not cut


def test_the_tokenizers_end_token_ends_too() -> None:
    subject = tiny_subject("llama")
    subject.model.generation_config.eos_token_id = None
    subject.model.lm_head.weight[EOS] = 0
    row = rows_of()[:1]
    free = generate(subject, row, 4)
    subject.model.lm_head.weight[EOS] = 2 * subject.model.lm_head.weight[free[0][0]]
    assert generate(subject, row, 4) == [[]]


def batch_sizes(subject: Subject, ids: Ids, **options: Any) -> tuple[Ids, list[int]]:
    """The answers, and the number of rows in each pass."""
    sizes: list[int] = []
    handle = decoder_blocks(subject)[-1].register_forward_hook(
        lambda m, a, y: sizes.append((y[0] if isinstance(y, tuple) else y).shape[0])
    )
    answers = generate(subject, ids, 12, reuse=False, **options)
    handle.remove()
    return answers, sizes


def test_done_stops_rows_and_finished_rows_leave(subject: Subject) -> None:
    ids = rows_of(tails=(4,) * 8 if is_recurrent(subject) else (1, 9, 4, 6, 15, 2, 3, 8))
    free, sizes = batch_sizes(subject, ids)
    chosen = {tuple(row[:2]) for row in free[:6]}
    stopped, fewer = batch_sizes(subject, ids, done=lambda new: tuple(new) in chosen)
    assert stopped == [row[:2] if tuple(row[:2]) in chosen else row for row in free]
    assert sizes[-1] > fewer[-1]
    assert fewer[-1] <= 2


def test_all_done_ends_the_batch() -> None:
    subject = tiny_subject("llama")
    answers, sizes = batch_sizes(subject, rows_of(), done=lambda new: True)
    assert {len(row) for row in answers} == {1}
    assert len(sizes) == 1  # the prefill alone


def test_progress_of_answers_reaches_its_total(subject: Subject) -> None:
    """Whether rows end by themselves, by a verdict or by their length: every token is settled once."""
    seen: list[tuple[int, list[int]]] = []

    class Counter(Reporter):
        def bar(self, title: str, total: int) -> Any:
            steps: list[int] = []
            seen.append((total, steps))
            return nullcontext(steps.append)

    with report_to(Counter()):
        generate(subject, rows_of(), 12, done=lambda new: new[-1] % 5 == 0)
    total, steps = seen[-1]
    assert sum(steps) == total == 6 * 12
    assert len(steps) > 1  # it moves before the end
