"""The fluency of answers, against formulas written out anew, one prompt at a time."""

from __future__ import annotations

import pytest
import torch
from tests.support.plans import PlanMaker
from tests.support.scorers import plain_log_probs, refusal_records
from tests.support.scores import is_sound
from tests.support.tiny import tiny_subject

from obliteratus.core.errors import UserError
from obliteratus.core.settings import Step
from obliteratus.core.types import Prompt, PromptSet, Subject
from obliteratus.excise.live.hooks import applied, without_edits
from obliteratus.inference.chat_template import render_prompts
from obliteratus.inference.generate import stop_tokens
from obliteratus.verify import Measurement, ScorerContext, measure
from obliteratus.verify.fluency import answer_losses, fluency
from obliteratus.verify.intervals import group_ratio


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def subject(request: pytest.FixtureRequest) -> Subject:
    """Plain attention; and windows with soft-capped logits."""
    return tiny_subject(request.param)


@pytest.mark.parametrize("opening", [0, 3])
def test_losses_are_of_the_answer_behind_its_prompt(subject: Subject, prompts: PromptSet, opening: int) -> None:
    answers = ["The sun.", "", "no no no no no no", "A"]
    found = answer_losses(subject, prompts["target"], answers, opening)
    for prompt, answer, loss in zip(render_prompts(subject, prompts["target"]), answers, found.tolist(), strict=True):
        told = subject.tokenizer(answer, add_special_tokens=False)["input_ids"] or [min(stop_tokens(subject))]
        p = plain_log_probs(subject, prompt + told)[len(prompt) - 1 : -1]
        each = -p.gather(1, torch.tensor(told)[:, None])
        assert loss == pytest.approx(each[opening if len(told) > opening else 0 :].mean().item(), rel=1e-3)
    moved = answer_losses(subject, prompts["target"][::-1], answers, opening)
    assert not torch.allclose(found, moved, atol=1e-3)  # control: behind another prompt it is another loss


def test_edited_answers_are_scored_by_the_unedited_model(
    subject: Subject, prompts: PromptSet, make_plan: PlanMaker
) -> None:
    said = refusal_records([(g, f"answer {i}", "absent") for g in ("target", "control") for i in range(4)])
    unlike = make_plan(subject, strength=2.0)
    with applied(subject, unlike):
        found = fluency(ScorerContext(subject, prompts, Measurement(), said, base=subject))
        edited = answer_losses(subject, prompts["target"], [f"answer {i}" for i in range(4)], 4)
    base = {g: answer_losses(subject, prompts[g], [f"answer {i}" for i in range(4)], 4) for g in ("target", "control")}
    assert torch.equal(found.items["fluency.target"].values, base["target"])
    assert not torch.allclose(edited, base["target"], atol=1e-3)  # control: the edit does change losses
    means = {g: x.double().mean() for g, x in base.items()}
    assert found.scores["fluency.target"].value == pytest.approx(means["target"].exp().item(), rel=1e-5)
    assert found.scores["fluency.control"].value == pytest.approx(means["control"].exp().item(), rel=1e-5)
    expected = (means["target"] - means["control"]).exp().item()
    assert found.scores["fluency.ratio"].value == pytest.approx(expected, rel=1e-5)


def test_it_runs_behind_the_refusal_scorer(subject: Subject, prompts: PromptSet, make_plan: PlanMaker) -> None:
    steps = (Step(use="behavior", tokens=6), Step(use="fluency"))
    before = measure(subject, prompts, steps)
    assert {"fluency.target", "fluency.control", "fluency.ratio"} <= set(before.scores)
    with applied(subject, make_plan(subject)):
        after = measure(subject, prompts, steps, before, base=subject)
        with pytest.raises(UserError, match="not at hand"):
            measure(subject, prompts, steps, before)
    assert all(map(is_sound, after.scores.values()))


def test_it_needs_answers(subject: Subject, prompts: PromptSet) -> None:
    with pytest.raises(UserError, match="put the step behavior before it"):
        fluency(ScorerContext(subject, prompts, None))


def test_fewer_prompts_are_spread_over_all(subject: Subject, prompts: PromptSet) -> None:
    said = refusal_records([(g, f"answer {i}", "absent") for g in ("target", "control") for i in range(4)])
    every, some = (fluency(ScorerContext(subject, prompts, None, said), prompts=n) for n in (4, 2))
    for name in ("fluency.target", "fluency.control"):
        torch.testing.assert_close(some.items[name].values, every.items[name].values[[0, 2]])
    assert every.scores["fluency.ratio"].n == 8


def test_one_group_has_no_ratio(subject: Subject, prompts: PromptSet) -> None:
    alone = PromptSet({"target": prompts["target"], "bypass": (Prompt("go"),)})
    found = fluency(ScorerContext(subject, alone, None, refusal_records([("target", "yes", "absent")] * 4)))
    assert set(found.scores) == {"fluency.target"}


@pytest.mark.parametrize("part", ["attn.out", "mlp.out", "attn.in", "embed"])
def test_live_edits_stand_still_and_come_back(
    subject: Subject, prompts: PromptSet, make_plan: PlanMaker, part: str
) -> None:
    row = render_prompts(subject, prompts["target"])[0]
    plain = plain_log_probs(subject, row)
    with applied(subject, make_plan(subject, (part,))):
        edited = plain_log_probs(subject, row)
        with applied(subject, make_plan(subject, ("mlp.out",), seed=1)), without_edits():
            assert torch.equal(plain_log_probs(subject, row), plain)
        assert torch.equal(plain_log_probs(subject, row), edited)
        with pytest.raises(RuntimeError, match="on purpose"), without_edits():
            raise RuntimeError("on purpose")
        assert torch.equal(plain_log_probs(subject, row), edited)
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
