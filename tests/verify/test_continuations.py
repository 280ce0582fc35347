"""KL over the base's own answers, against formulas written out anew, one prompt at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from tests.support.plans import PlanMaker
from tests.support.scorers import plain_log_probs
from tests.support.tiny import tiny_subject
from torch import Tensor

from obliteratus.core.errors import UserError
from obliteratus.core.settings import Step
from obliteratus.core.types import PromptSet, Subject
from obliteratus.excise.live.hooks import applied
from obliteratus.inference import teacher_forced
from obliteratus.inference.chat_template import render_prompts
from obliteratus.inference.generate import generate
from obliteratus.inference.teacher_forced import read_answers
from obliteratus.prompts import evenly_spaced
from obliteratus.verify import Measurement, ScorerContext, measure
from obliteratus.verify.behavior import CONTROL_ANSWERS, PADDING
from obliteratus.verify.continuations import continuation_kl

TOKENS = 5
ANSWERS = Step(use="behavior", tokens=TOKENS)


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


def answered(subject: Subject, prompts: PromptSet) -> Measurement:
    return measure(subject, prompts, (ANSWERS,))


def drift_of(
    subject: Subject, asked: PromptSet, before: Measurement, base: Subject | None = None, **options: int
) -> Measurement:
    return continuation_kl(ScorerContext(subject, asked, before, base=base or subject), **options)


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


# --------------------------------------------------------------------------------------------- the scorer
def test_it_is_the_mean_divergence_over_the_bases_own_tokens(
    unending: Subject, prompts: PromptSet, make_plan: PlanMaker
) -> None:
    subject, ids = unending, render_prompts(unending, prompts["control"])
    before = answered(subject, prompts)
    rows = [row + answer for row, answer in zip(ids, before.tensors[CONTROL_ANSWERS].tolist(), strict=True)]
    base = [plain_log_probs(subject, row) for row in rows]
    for row, p in zip(rows, base, strict=True):  # greedy: each token is the likeliest after those before it
        assert row[-TOKENS:] == p[-TOKENS - 1 : -1].argmax(-1).tolist()
    with applied(subject, make_plan(subject)):
        found = drift_of(subject, prompts, before)
        edited = [plain_log_probs(subject, row) for row in rows]
    expected = mean_kl(base, edited, TOKENS)
    torch.testing.assert_close(found.items["kl.continuation"].values.double(), expected, rtol=2e-3, atol=1e-5)
    for tail, value in {
        "mean": expected.mean(),
        "p95": expected.quantile(0.95),
        "p99": expected.quantile(0.99),
    }.items():
        score = found.scores[f"kl.continuation.{tail}"]
        assert score.value == pytest.approx(value.item(), rel=2e-3)
        assert (score.n, score.unit) == (4, "nats")
    shuffled = replace_answers(before, (before.tensors[CONTROL_ANSWERS] + 7) % 256)  # control: other answers
    with applied(subject, make_plan(subject)):
        other = drift_of(subject, prompts, shuffled).items["kl.continuation"].values
    assert not torch.allclose(other.double(), expected, rtol=2e-2)


def mean_kl(base: list[Tensor], edited: list[Tensor], tokens: int) -> Tensor:
    kept = slice(-tokens - 1, -1)
    each = [(p[kept].exp() * (p[kept] - q[kept])).sum(-1).mean() for p, q in zip(base, edited, strict=True)]
    return torch.stack(each)


def replace_answers(before: Measurement, answers: Tensor) -> Measurement:
    return replace(before, tensors={**before.tensors, CONTROL_ANSWERS: answers})


def test_another_model_may_be_the_base(subject: Subject, prompts: PromptSet, make_plan: PlanMaker) -> None:
    """Two models in memory, as `verify --against` has them, give what one with live edits does."""
    before = answered(subject, prompts)
    with applied(subject, make_plan(subject)):
        live = drift_of(subject, prompts, before).items["kl.continuation"].values
        twin = drift_of(subject, prompts, before, base=tiny_subject(subject.source.id.removeprefix("tiny:")))
        stranger = drift_of(subject, prompts, before, base=tiny_subject("llama", seed=1))  # control
    torch.testing.assert_close(twin.items["kl.continuation"].values, live, rtol=1e-4, atol=1e-7)
    assert not torch.allclose(stranger.items["kl.continuation"].values, live, rtol=1e-2)


def test_the_unedited_model_is_at_zero(subject: Subject, prompts: PromptSet, make_plan: PlanMaker) -> None:
    before = answered(subject, prompts)
    assert {s.value for s in drift_of(subject, prompts, before).scores.values()} == {0.0}
    with applied(subject, make_plan(subject)):  # control: an edited one is not
        after = drift_of(subject, prompts, before)
    assert after.scores["kl.continuation.mean"].value > 1e-3


def test_one_token_is_the_first_token_kl(subject: Subject, prompts: PromptSet, make_plan: PlanMaker) -> None:
    steps = (ANSWERS, Step(use="first_token_kl"), Step(use="continuation_kl", tokens=1))
    before = measure(subject, prompts, steps)
    with applied(subject, make_plan(subject)):
        after = measure(subject, prompts, steps, before, base=subject)
    for tail in ("mean", "p95", "p99"):
        assert after.scores[f"kl.continuation.{tail}"].value == pytest.approx(
            after.scores[f"kl.first_token.{tail}"].value, rel=1e-3
        )


def test_an_answer_that_ends_counts_its_end_and_no_more(subject: Subject, prompts: PromptSet) -> None:
    with ending_with(subject, None):
        free = generate(subject, render_prompts(subject, prompts["control"]), TOKENS)
    stop = free[0][2]  # now the third token of one answer is the end token
    with ending_with(subject, stop):
        before = answered(subject, prompts)
    cut = free[0].index(stop)
    table = before.tensors[CONTROL_ANSWERS]
    assert [t for t in table[0].tolist() if t != PADDING] == [*free[0][:cut], stop]
    assert table.shape == (4, TOKENS)


def test_fewer_prompts_are_spread_over_all(subject: Subject, prompts: PromptSet, make_plan: PlanMaker) -> None:
    before = answered(subject, prompts)
    told = [{"group": "control", "verdict": v} for v in ("shown", "absent", "absent", "absent")]
    with applied(subject, make_plan(subject)):
        some = drift_of(subject, prompts, replace(before, records=told), prompts=2)
        every = drift_of(subject, prompts, replace(before, records=()))
    values = every.items["kl.continuation"].values
    assert evenly_spaced(4, 2) == [0, 2]
    torch.testing.assert_close(some.items["kl.continuation"].values, values[[0, 2]], rtol=1e-3, atol=1e-6)
    assert some.scores["kl.continuation.answered.mean"].value == pytest.approx(values[2].item(), rel=1e-3)
    assert "kl.continuation.answered.mean" not in every.scores


def test_no_more_than_one_batch_of_logits_is_held(
    subject: Subject, prompts: PromptSet, make_plan: PlanMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Smaller batches read fewer rows at a time, and give the same values."""
    before = answered(subject, prompts)
    with applied(subject, make_plan(subject)):
        whole = drift_of(subject, prompts, before).items["kl.continuation"].values
        read, original = list[int](), teacher_forced.ForcedAnswers.read
        monkeypatch.setattr(
            teacher_forced.ForcedAnswers, "read", lambda self, batch: read.append(len(batch)) or original(self, batch)
        )
        monkeypatch.setattr(teacher_forced, "LOGIT_TOKENS", TOKENS)
        small = drift_of(subject, prompts, before).items["kl.continuation"].values
    assert read == [1] * 8  # each of four answers by either model
    torch.testing.assert_close(small, whole, rtol=1e-3, atol=1e-6)


def test_it_needs_answers_and_the_unedited_model(subject: Subject, prompts: PromptSet) -> None:
    for before in (None, Measurement()):
        with pytest.raises(UserError, match="put the step behavior before it"):
            continuation_kl(ScorerContext(subject, prompts, before, base=subject))
    before = answered(subject, prompts)
    assert not continuation_kl(ScorerContext(subject, prompts, None, before)).scores  # nothing to compare with yet
    with pytest.raises(UserError, match="not at hand"):
        continuation_kl(ScorerContext(subject, prompts, before))
