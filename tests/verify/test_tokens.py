"""KL over whole continuations, against formulas written out anew, one prompt at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tests.support.plans import PlanMaker
from tests.support.scorers import plain_log_probs, refusal_records
from tests.support.scores import is_sound
from tests.support.tiny import tiny_subject

from obliteratus.core.errors import UserError
from obliteratus.core.settings import Step
from obliteratus.core.types import PromptSet, Subject
from obliteratus.excise.live.hooks import applied
from obliteratus.inference.chat_template import render_prompts
from obliteratus.inference.generate import generate
from obliteratus.inference.teacher_forced import read_answers
from obliteratus.prompts import evenly_spaced
from obliteratus.verify import ScorerContext, measure
from obliteratus.verify import tokens as tokens_module
from obliteratus.verify.tokens import IDS, LOGITS, PADDING, tokens_kl

TOKENS = 5


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def subject(request: pytest.FixtureRequest) -> Subject:
    """Plain attention; and windows with soft-capped logits."""
    return tiny_subject(request.param)


@pytest.fixture
def unending(subject: Subject) -> Iterator[Subject]:
    """Nothing ends an answer."""
    with ending_with(subject, None):
        yield subject


@contextmanager
def ending_with(subject: Subject, token: int | None) -> Iterator[None]:
    """Inside, this token ends an answer, and no other."""
    kept = subject.model.generation_config.eos_token_id, subject.tokenizer.eos_token_id
    subject.model.generation_config.eos_token_id = subject.tokenizer.eos_token_id = token
    try:
        yield
    finally:
        subject.model.generation_config.eos_token_id, subject.tokenizer.eos_token_id = kept


# ------------------------------------------------------------------------------------------------ reading
def test_answers_are_read_as_one_at_a_time(subject: Subject, prompts: PromptSet) -> None:
    ids = render_prompts(subject, prompts["control"])
    answers = [[65], [66, 67, 68], [69] * 7, [70, 71]]
    found = read_answers(subject, ids, answers, lambda row, logits: (row, logits))
    for i, (row, logits) in enumerate(found):
        expected = plain_log_probs(subject, ids[i] + answers[i])[len(ids[i]) - 1 : -1]
        assert row == i
        torch.testing.assert_close(logits.double().log_softmax(-1), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found[1][1][0], found[1][1][1], atol=1e-3)  # control: positions differ


# ------------------------------------------------------------------------------------------------ tokens_kl
def test_it_is_the_mean_divergence_over_the_bases_own_tokens(
    unending: Subject, prompts: PromptSet, make_plan: PlanMaker
) -> None:
    subject, ids = unending, render_prompts(unending, prompts["control"])
    before = tokens_kl(ScorerContext(subject, prompts, None), tokens=TOKENS)
    rows = [row + answer for row, answer in zip(ids, before.tensors[IDS].tolist(), strict=True)]
    assert not before.scores
    base = [plain_log_probs(subject, row) for row in rows]
    for row, p in zip(rows, base, strict=True):  # greedy: each token is the likeliest after those before it
        assert row[-TOKENS:] == p[-TOKENS - 1 : -1].argmax(-1).tolist()
    with applied(subject, make_plan(subject)):
        found = tokens_kl(ScorerContext(subject, prompts, before), tokens=TOKENS)
        edited = [plain_log_probs(subject, row) for row in rows]
    kept = slice(-TOKENS - 1, -1)
    each = [(p[kept].exp() * (p[kept] - q[kept])).sum(-1).mean() for p, q in zip(base, edited, strict=True)]
    expected = torch.stack(each)
    torch.testing.assert_close(found.items["kl.tokens"].values.double(), expected, rtol=2e-3, atol=1e-5)
    for tail, value in {
        "mean": expected.mean(),
        "p95": expected.quantile(0.95),
        "p99": expected.quantile(0.99),
    }.items():
        score = found.scores[f"kl.tokens.{tail}"]
        assert score.value == pytest.approx(value.item(), rel=2e-3)
        assert is_sound(score)
        assert (score.n, score.unit) == (4, "nats")


def test_the_unedited_model_is_at_zero(subject: Subject, prompts: PromptSet, make_plan: PlanMaker) -> None:
    before = tokens_kl(ScorerContext(subject, prompts, None), tokens=TOKENS)
    assert {s.value for s in tokens_kl(ScorerContext(subject, prompts, before), tokens=TOKENS).scores.values()} == {0.0}
    with applied(subject, make_plan(subject)):  # control: an edited one is not
        after = tokens_kl(ScorerContext(subject, prompts, before), tokens=TOKENS)
    assert after.scores["kl.tokens.mean"].value > 1e-3


def test_one_token_is_the_first_token_kl(subject: Subject, prompts: PromptSet, make_plan: PlanMaker) -> None:
    steps = (Step(use="first_token_kl"), Step(use="tokens_kl", tokens=1))
    before = measure(subject, prompts, steps)
    with applied(subject, make_plan(subject)):
        after = measure(subject, prompts, steps, before)
    for tail in ("mean", "p95", "p99"):
        assert after.scores[f"kl.tokens.{tail}"].value == pytest.approx(
            after.scores[f"kl.first_token.{tail}"].value, rel=1e-3
        )


def test_an_answer_that_ends_counts_its_end_and_no_more(subject: Subject, prompts: PromptSet) -> None:
    with ending_with(subject, None):
        free = generate(subject, render_prompts(subject, prompts["control"]), TOKENS)
    stop = free[0][2]  # now the third token of one answer is the end token
    with ending_with(subject, stop):
        before = tokens_kl(ScorerContext(subject, prompts, None), tokens=TOKENS)
    cut = free[0].index(stop)
    assert [t for t in before.tensors[IDS][0].tolist() if t != PADDING] == [*free[0][:cut], stop]
    counts = [int((row != PADDING).sum()) for row in before.tensors[IDS]]
    assert before.tensors[LOGITS].shape[0] == sum(counts)
    assert max(counts) <= TOKENS


def test_fewer_prompts_are_spread_over_all(subject: Subject, prompts: PromptSet, make_plan: PlanMaker) -> None:
    assert evenly_spaced(3, 5) == [0, 1, 2]
    assert evenly_spaced(10, 4) == [0, 2, 5, 7]
    options: dict[str, Any] = {"tokens": TOKENS, "prompts": 2}
    before = tokens_kl(ScorerContext(subject, prompts, None), **options)
    whole = tokens_kl(ScorerContext(subject, prompts, None), tokens=TOKENS)
    assert torch.equal(before.tensors[IDS], whole.tensors[IDS][[0, 2]])
    told = refusal_records([("control", "", v) for v in ("shown", "absent", "absent", "absent")])
    with applied(subject, make_plan(subject)):
        some = tokens_kl(ScorerContext(subject, prompts, told | before), **options)
        every = tokens_kl(ScorerContext(subject, prompts, whole), tokens=TOKENS)
    values = every.items["kl.tokens"].values
    torch.testing.assert_close(some.items["kl.tokens"].values, values[[0, 2]], rtol=1e-3, atol=1e-6)
    assert some.scores["kl.tokens.answered.mean"].value == pytest.approx(values[2].item(), rel=1e-3)
    assert "kl.tokens.answered.mean" not in every.scores


def test_what_it_keeps_is_what_its_docstring_says(unending: Subject, prompts: PromptSet) -> None:
    kept = tokens_kl(ScorerContext(unending, prompts, None), tokens=TOKENS).tensors[LOGITS]
    assert kept.dtype == unending.model.dtype
    assert kept.nbytes == 4 * TOKENS * unending.model.config.vocab_size * 4


def test_too_little_memory_is_said_before_it_is_taken(
    subject: Subject, prompts: PromptSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens_module, "host_memory", lambda: 1000)
    with pytest.raises(UserError, match="fewer tokens or prompts"):
        tokens_kl(ScorerContext(subject, prompts, None), tokens=TOKENS)
