"""Streamed answers are what `generate` writes, pieces are whole characters, and draws follow the distribution."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tests.support.one_at_a_time import rows_of, shared_subject
from tests.support.tiny import KINDS, tiny_subject

from obliteratus.core.errors import UserError
from obliteratus.inference.answers import AnswerDecoder
from obliteratus.inference.generate import generate
from obliteratus.inference.stream import AnswerLimits, ConversationCache, cut_mark, draw_token, stream_text

GREEDY = AnswerLimits()


def greedy(cache: ConversationCache, ids: list[int], n: int) -> list[int]:
    row = list(ids)
    for _ in range(n):
        row.append(draw_token(cache.next_logits(row), GREEDY, torch.Generator()))
    return row[len(ids) :]


@pytest.mark.parametrize("name", KINDS)
def test_a_conversation_is_answered_as_each_of_its_turns_alone(name: str) -> None:
    """Whatever the cache holds: nothing, a longer row with the same beginning, the same row, or another one."""
    subject, ids = shared_subject(name), rows_of()[0]
    subject.model.generation_config.eos_token_id = None
    cache = ConversationCache(subject)
    first = greedy(cache, ids, 6)
    asked = [ids, [*ids, *first, *rows_of()[1]], [*ids, *first[:3], *rows_of()[2]], ids, rows_of()[3]]
    found = [greedy(cache, row, 6) for row in asked]
    assert found == [answer_alone(subject, row) for row in asked]


def answer_alone(subject: Any, row: list[int]) -> list[int]:
    return greedy(ConversationCache(subject), row, 6)


@pytest.mark.parametrize("name", KINDS)
def test_streamed_tokens_are_those_of_generate(name: str) -> None:
    subject = shared_subject(name)
    (expected,) = generate(subject, rows_of()[:1], 8)
    assert greedy(ConversationCache(subject), rows_of()[0], 8)[: len(expected)] == expected


def test_what_two_turns_share_runs_once() -> None:
    subject = tiny_subject("llama")
    cache, seen = ConversationCache(subject), []
    handle = subject.model.get_input_embeddings().register_forward_hook(lambda m, a, out: seen.append(a[0].shape[1]))
    row = rows_of()[0]
    cache.next_logits(row)
    cache.next_logits([*row, 5])
    cache.next_logits([*row[:-2], 7])
    cache.next_logits([*row[:-2], 7])
    handle.remove()
    assert seen == [len(row), 1, 1, 1]


def test_an_interrupted_pass_leaves_nothing_that_is_used_again() -> None:
    subject = tiny_subject("llama")
    cache, row = ConversationCache(subject), rows_of()[0]
    before = cache.next_logits(row)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = subject.module(f"{subject.layers}.1").register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):  # block 0 has its keys by now, block 1 has not
        cache.next_logits([*row, 9])
    handle.remove()
    assert torch.equal(cache.next_logits(row), before)


# ------------------------------------------------------------------------------------------------- draws
def test_draws_follow_the_models_distribution_among_the_likeliest() -> None:
    logits = torch.tensor([2.0, -1.0, 1.0, 0.5, -40.0])
    limits, generator = AnswerLimits(temperature=0.7, top_p=0.9), torch.Generator().manual_seed(3)
    n = 4000
    counts = torch.zeros(5)
    for _ in range(n):
        counts[draw_token(logits, limits, generator)] += 1
    weights = [math.exp(x / 0.7) for x in logits.tolist()]  # an independent formula, in float64
    kept, total = [], 0.0
    for i in sorted(range(5), key=lambda i: -weights[i]):
        if total < 0.9 * sum(weights):
            kept.append(i)
        total += weights[i]
    assert kept == [0, 2]  # together 0.91 of the probability; the first alone is 0.72
    expected = torch.tensor([weights[i] if i in kept else 0.0 for i in range(5)])
    expected = expected / expected.sum()
    assert float((counts / n - expected).abs().max()) < 4 * math.sqrt(0.25 / n)
    assert int(counts[[1, 3, 4]].sum()) == 0


def test_greedy_ignores_the_seed_and_draws_do_not() -> None:
    logits = torch.linspace(0, 1, 50)
    drawn = [
        draw_token(logits, AnswerLimits(temperature=5.0), torch.Generator().manual_seed(s)) for s in (1, 1, 2, 3, 4)
    ]
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) > 1
    assert draw_token(logits, GREEDY, torch.Generator().manual_seed(1)) == 49


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_broken_model_is_named(bad: float) -> None:
    with pytest.raises(UserError, match="NaN or infinity"):
        draw_token(torch.tensor([0.0, bad]), GREEDY, torch.Generator())


@pytest.mark.parametrize(
    "options", [{"tokens": 0}, {"temperature": -0.1}, {"temperature": math.nan}, {"top_p": 0.0}, {"top_p": 1.1}]
)
def test_limits_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        AnswerLimits(**options)


# -------------------------------------------------------------------------------------------------- text
TEXT = "Größe: ☄️, 3 < 4 [see] <think>naïve</think>  \n漢字"


def test_pieces_are_whole_characters_and_add_up() -> None:
    decoder = AnswerDecoder.create(tiny_subject("llama"))  # a token a byte, so characters are split
    row = decoder.tokenizer(TEXT)["input_ids"]
    pieces = list(stream_text(decoder, iter(row)))
    assert "".join(pieces) == decoder.decode(row) == TEXT
    assert len(pieces) > 20
    assert not any("\ufffd" in piece for piece in pieces)
    assert any("<think>" in piece for piece in pieces)  # a mark comes in one piece


def test_bytes_that_never_become_a_character_are_shown() -> None:
    decoder = AnswerDecoder.create(tiny_subject("llama"))
    row = decoder.tokenizer("a☄")["input_ids"][:-1]
    assert decoder.decode(row).endswith("\ufffd")
    assert "".join(stream_text(decoder, row)) == decoder.decode(row)


def test_a_piece_comes_with_its_token() -> None:
    """Nothing waits for the end of the answer."""
    decoder = AnswerDecoder.create(tiny_subject("llama"))
    row = decoder.tokenizer("abc")["input_ids"]
    tokens = iter(row)
    assert next(stream_text(decoder, tokens)) == "a"
    assert next(tokens) == row[1]


@pytest.mark.parametrize(
    ("tokens", "cut"),
    [([1, 2, 3, 7, 8, 9, 4], [1, 2, 3]), ([7, 7, 8, 9], [7]), ([7, 8, 7, 8], [7, 8, 7, 8]), ([7, 8, 9], [])],
)
def test_a_mark_of_several_tokens_ends_the_answer(tokens: list[int], cut: list[int]) -> None:
    assert list(cut_mark(tokens, (7, 8, 9))) == cut
    assert list(cut_mark(tokens, ())) == tokens
