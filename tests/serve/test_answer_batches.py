"""Callers that ask at the same time get what each alone would get, and an error reaches the one who waits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tests.support.one_at_a_time import rows_of
from tests.support.plans import random_plan
from tests.support.tiny import tiny_subject

from obliteratus.core.errors import UserError
from obliteratus.core.types import Subject
from obliteratus.excise.live.hooks import applied
from obliteratus.inference.answers import AnswerDecoder
from obliteratus.inference.generate import generate
from obliteratus.inference.hooks import decoder_blocks
from obliteratus.serve.answer_batches import AnswerBatches

TOKENS = 6


@pytest.fixture
def subject() -> Subject:
    return tiny_subject("llama")


@pytest.fixture
def batches(subject: Subject) -> Iterator[AnswerBatches]:
    made = AnswerBatches(subject, random_plan(subject, strength=1.5))
    yield made
    made.close()


def test_answers_are_those_of_each_alone(subject: Subject, batches: AnswerBatches) -> None:
    seen = list[int]()
    hook = decoder_blocks(subject)[0].register_forward_hook(lambda module, args, y: seen.append(len(args[0])))
    found = [future.result() for future in [batches.ask(row, TOKENS) for row in rows_of()]]
    hook.remove()
    assert max(seen) > 1  # some were answered together
    decoder = AnswerDecoder.create(subject)
    with applied(subject, random_plan(subject, strength=1.5)):
        expected = [generate(subject, [row], TOKENS)[0] for row in rows_of()]
    assert [answer.text for answer in found] == decoder.decode_all(expected)
    assert [answer.tokens for answer in found] == list(map(len, expected))


def test_the_model_is_unedited_between_answers(subject: Subject, batches: AnswerBatches) -> None:
    before = generate(subject, rows_of(), TOKENS)
    edited = [batches.ask(row, TOKENS).result().text for row in rows_of()]
    assert generate(subject, rows_of(), TOKENS) == before
    assert edited != AnswerDecoder.create(subject).decode_all(before)


def test_a_stop_sequence_ends_an_answer_and_is_left_out(batches: AnswerBatches) -> None:
    whole = batches.ask(rows_of()[0], TOKENS).result()
    assert not whole.ended
    stop = whole.text[2:4]
    cut = batches.ask(rows_of()[0], TOKENS, [stop]).result()
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.ended


def test_different_limits_are_kept(batches: AnswerBatches) -> None:
    futures = [batches.ask(rows_of()[0], tokens) for tokens in (1, 3, 1)]
    assert [future.result().tokens for future in futures] == [1, 3, 1]


def test_an_error_reaches_who_waits_and_ends_nothing_else(subject: Subject, batches: AnswerBatches) -> None:
    def run_out(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        raise torch.OutOfMemoryError("no more")

    hook = decoder_blocks(subject)[0].register_forward_pre_hook(run_out)
    with pytest.raises(torch.OutOfMemoryError):
        batches.ask(rows_of()[0], TOKENS).result()
    hook.remove()
    assert batches.ask(rows_of()[0], TOKENS).result().tokens


def test_a_plan_of_another_model_is_refused(subject: Subject) -> None:
    with pytest.raises(UserError, match="another model"):
        AnswerBatches(subject, random_plan(tiny_subject("qwen2")))
