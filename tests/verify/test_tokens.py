"""KL over whole continuations, and the fluency of answers: against formulas written out anew, one prompt at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tests.support.plans import PlanMaker
from tests.support.tiny import tiny_subject
from torch import Tensor

from obliteratus.core.errors import UserError
from obliteratus.core.settings import Step
from obliteratus.core.types import Prompt, PromptSet, Subject
from obliteratus.excise.live.hooks import applied, without_edits
from obliteratus.inference.chat_template import render_prompts
from obliteratus.inference.generate import generate, stop_tokens
from obliteratus.inference.teacher_forced import read_answers
from obliteratus.prompts import evenly_spaced
from obliteratus.verify import Measurement, ScorerContext, measure
from obliteratus.verify import tokens as tokens_module
from obliteratus.verify.fluency import answer_losses, fluency
from obliteratus.verify.intervals import group_ratio
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


def logp(subject: Subject, row: list[int]) -> Tensor:
    """What plain transformers says after each token of the row. [tokens, vocabulary]."""
    return subject.model(torch.tensor([row])).logits[0].double().log_softmax(-1)


def named(records: list[tuple[str, str, str]]) -> Measurement:
    return Measurement(records=[{"scorer": "refusal", "group": g, "answer": a, "verdict": v} for g, a, v in records])


# ------------------------------------------------------------------------------------------------ reading
def test_answers_are_read_as_one_at_a_time(subject: Subject, prompts: PromptSet) -> None:
    ids = render_prompts(subject, prompts["control"])
    answers = [[65], [66, 67, 68], [69] * 7, [70, 71]]
    found = read_answers(subject, ids, answers, lambda row, logits: (row, logits))
    for i, (row, logits) in enumerate(found):
        expected = logp(subject, ids[i] + answers[i])[len(ids[i]) - 1 : -1]
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
    base = [logp(subject, row) for row in rows]
    for row, p in zip(rows, base, strict=True):  # greedy: each token is the likeliest after those before it
        assert row[-TOKENS:] == p[-TOKENS - 1 : -1].argmax(-1).tolist()
    with applied(subject, make_plan(subject)):
        found = tokens_kl(ScorerContext(subject, prompts, before), tokens=TOKENS)
        edited = [logp(subject, row) for row in rows]
    kept = slice(-TOKENS - 1, -1)
    each = [(p[kept].exp() * (p[kept] - q[kept])).sum(-1).mean() for p, q in zip(base, edited, strict=True)]
    expected = torch.stack(each)
    torch.testing.assert_close(found.tensors["kl.tokens.control"].double(), expected, rtol=2e-3, atol=1e-5)
    for tail, value in {
        "mean": expected.mean(),
        "p95": expected.quantile(0.95),
        "p99": expected.quantile(0.99),
    }.items():
        score = found.scores[f"kl.tokens.{tail}"]
        assert score.value == pytest.approx(value.item(), rel=2e-3)
        assert score.low <= score.value <= score.high
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
    told = named([("control", "", v) for v in ("refused", "complied", "complied", "complied")])
    with applied(subject, make_plan(subject)):
        some = tokens_kl(ScorerContext(subject, prompts, told | before), **options)
        every = tokens_kl(ScorerContext(subject, prompts, whole), tokens=TOKENS)
    values = every.tensors["kl.tokens.control"]
    torch.testing.assert_close(some.tensors["kl.tokens.control"], values[[0, 2]], rtol=1e-3, atol=1e-6)
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


# ------------------------------------------------------------------------------------------------ fluency
@pytest.mark.parametrize("opening", [0, 3])
def test_losses_are_of_the_answer_behind_its_prompt(subject: Subject, prompts: PromptSet, opening: int) -> None:
    answers = ["The sun.", "", "no no no no no no", "A"]
    found = answer_losses(subject, prompts["target"], answers, opening)
    for prompt, answer, loss in zip(render_prompts(subject, prompts["target"]), answers, found.tolist(), strict=True):
        told = subject.tokenizer(answer, add_special_tokens=False)["input_ids"] or [min(stop_tokens(subject))]
        p = logp(subject, prompt + told)[len(prompt) - 1 : -1]
        each = -p.gather(1, torch.tensor(told)[:, None])
        assert loss == pytest.approx(each[opening if len(told) > opening else 0 :].mean().item(), rel=1e-3)
    moved = answer_losses(subject, prompts["target"][::-1], answers, opening)
    assert not torch.allclose(found, moved, atol=1e-3)  # control: behind another prompt it is another loss


def test_edited_answers_are_scored_by_the_unedited_model(
    subject: Subject, prompts: PromptSet, make_plan: PlanMaker
) -> None:
    said = named([(g, f"answer {i}", "complied") for g in ("target", "control") for i in range(4)])
    unlike = make_plan(subject, strength=2.0)
    with applied(subject, unlike):
        found = fluency(ScorerContext(subject, prompts, Measurement(), said, base=subject))
        edited = answer_losses(subject, prompts["target"], [f"answer {i}" for i in range(4)], 4)
    base = {g: answer_losses(subject, prompts[g], [f"answer {i}" for i in range(4)], 4) for g in ("target", "control")}
    assert torch.equal(found.tensors["losses.answers.target"], base["target"])
    assert not torch.allclose(edited, base["target"], atol=1e-3)  # control: the edit does change losses
    means = {g: x.double().mean() for g, x in base.items()}
    assert found.scores["fluency.target"].value == pytest.approx(means["target"].exp().item(), rel=1e-5)
    assert found.scores["fluency.control"].value == pytest.approx(means["control"].exp().item(), rel=1e-5)
    expected = (means["target"] - means["control"]).exp().item()
    assert found.scores["fluency.ratio"].value == pytest.approx(expected, rel=1e-5)


def test_it_runs_behind_the_refusal_scorer(subject: Subject, prompts: PromptSet, make_plan: PlanMaker) -> None:
    steps = (Step(use="refusal", tokens=6), Step(use="fluency"))
    before = measure(subject, prompts, steps)
    assert {"fluency.target", "fluency.control", "fluency.ratio"} <= set(before.scores)
    with applied(subject, make_plan(subject)):
        after = measure(subject, prompts, steps, before, base=subject)
        with pytest.raises(UserError, match="not at hand"):
            measure(subject, prompts, steps, before)
    assert all(s.low <= s.value <= s.high and s.n > 0 for s in after.scores.values())


def test_it_needs_answers(subject: Subject, prompts: PromptSet) -> None:
    with pytest.raises(UserError, match="put the step refusal before it"):
        fluency(ScorerContext(subject, prompts, None))


def test_one_group_has_no_ratio(subject: Subject, prompts: PromptSet) -> None:
    alone = PromptSet({"target": prompts["target"], "bypass": (Prompt("go"),)})
    found = fluency(ScorerContext(subject, alone, None, named([("target", "yes", "complied")] * 4)))
    assert set(found.scores) == {"fluency.target"}


@pytest.mark.parametrize("part", ["attn.out", "mlp.out", "attn.in", "embed"])
def test_live_edits_stand_still_and_come_back(
    subject: Subject, prompts: PromptSet, make_plan: PlanMaker, part: str
) -> None:
    row = render_prompts(subject, prompts["target"])[0]
    plain = logp(subject, row)
    with applied(subject, make_plan(subject, (part,))):
        edited = logp(subject, row)
        with applied(subject, make_plan(subject, ("mlp.out",), seed=1)), without_edits():
            assert torch.equal(logp(subject, row), plain)
        assert torch.equal(logp(subject, row), edited)
        with pytest.raises(RuntimeError, match="on purpose"), without_edits():
            raise RuntimeError("on purpose")
        assert torch.equal(logp(subject, row), edited)
    assert not torch.allclose(edited, plain, atol=1e-3)  # control


def test_the_ratio_of_groups_covers(subject: Subject) -> None:
    """Two groups of normal losses: the true ratio lies in nearly all 95 % intervals, and 1 in nearly none."""
    generator = torch.Generator().manual_seed(0)
    drawn = [(torch.randn(60, generator=generator) + 0.7, torch.randn(40, generator=generator)) for _ in range(100)]
    found = [group_ratio(a, b) for a, b in drawn]
    true = torch.tensor(0.7).exp().item()
    assert sum(s.low <= true <= s.high for s in found) >= 88
    assert sum(s.low <= 1 <= s.high for s in found) <= 30
    assert found[0].n == 100
