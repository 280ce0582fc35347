"""The relevance of answers, against the formula, and against answers that belong to another prompt."""

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
from obliteratus.excise.live.hooks import applied
from obliteratus.inference.chat_template import render_prompts
from obliteratus.verify import Measurement, ScorerContext, measure
from obliteratus.verify.fluency import OPENING
from obliteratus.verify.relevance import ON_TOPIC, measure_relevance, relevance

SAID = refusal_records([(g, f"answer {i}", "absent") for g in ("target", "control") for i in range(4)])


@pytest.fixture(scope="module")
def subject() -> Subject:
    return tiny_subject("llama")


def plain_loss(subject: Subject, prompt: Prompt, answer: str, opening: int) -> float:
    """Return the mean loss of the answer's tokens from the opening on, in one plain pass."""
    row = render_prompts(subject, [prompt])[0]
    told = subject.tokenizer(answer, add_special_tokens=False)["input_ids"]
    p = plain_log_probs(subject, row + told)[len(row) - 1 : -1]
    return float(-p.gather(1, torch.tensor(told)[:, None])[opening:].mean())


def test_it_is_the_difference_of_log_probabilities_per_token(subject: Subject, prompts: PromptSet) -> None:
    found = relevance(ScorerContext(subject, prompts, None, SAID), opening=2)
    control = prompts["control"]
    for group in ("target", "control"):
        values = found.items[f"relevance.{group}"].values
        for row, (prompt, value) in enumerate(zip(prompts[group], values.tolist(), strict=True)):
            losses = [plain_loss(subject, p, f"answer {row}", 2) for p in (prompt, control[(row + 2) % 4])]
            assert value == pytest.approx(losses[1] - losses[0], abs=1e-4)
        assert found.scores[f"off_topic.{group}"].value == float((values < ON_TOPIC).float().mean())


def test_answers_of_exchanged_prompts_have_the_opposite_relevance(subject: Subject, prompts: PromptSet) -> None:
    one, other = prompts["target"][:2], prompts["control"][:2]
    forth, back = (measure_relevance(subject, a, ["yes it is", "no"], b) for a, b in ((one, other), (other, one)))
    torch.testing.assert_close(forth, -back)
    assert float(forth.abs().min()) > 1e-5  # control: the prompts do tell the answers apart
    assert torch.equal(measure_relevance(subject, one, ["yes", "no"], one), torch.zeros(2))


def test_refusals_and_loops_do_not_count(subject: Subject, prompts: PromptSet) -> None:
    verdicts = ("absent", "shown", "degenerate", "unknown")
    mixed = refusal_records([("target", f"answer {i}", v) for i, v in enumerate(verdicts)])
    found = relevance(ScorerContext(subject, prompts, None, mixed))
    every = relevance(ScorerContext(subject, prompts, None, SAID))
    torch.testing.assert_close(
        found.items["relevance.target"].values, every.items["relevance.target"].values[[0, 3]], atol=1e-5, rtol=0
    )
    none = relevance(ScorerContext(subject, prompts, None, refusal_records([("target", "no", "shown")] * 4)))
    assert not none.scores


def test_edited_answers_are_scored_by_the_unedited_model(
    subject: Subject, prompts: PromptSet, make_plan: PlanMaker
) -> None:
    plain = relevance(ScorerContext(subject, prompts, None, SAID))
    with applied(subject, make_plan(subject, strength=2.0)):
        found = relevance(ScorerContext(subject, prompts, Measurement(), SAID, base=subject))
        asked, said = prompts["target"], [f"answer {i}" for i in range(4)]
        edited = measure_relevance(subject, asked, said, [*prompts["control"][2:], *prompts["control"][:2]], OPENING)
    values = plain.items["relevance.target"].values
    assert torch.equal(found.items["relevance.target"].values, values)
    assert not torch.allclose(edited, values, atol=1e-4)  # control: the edit does change them


def test_it_runs_behind_the_behavior_scorer(subject: Subject, prompts: PromptSet, make_plan: PlanMaker) -> None:
    steps = (Step(use="behavior", tokens=6), Step(use="relevance"))
    before = measure(subject, prompts, steps)
    with applied(subject, make_plan(subject)):
        after = measure(subject, prompts, steps, before, base=subject)
        with pytest.raises(UserError, match="not at hand"):
            measure(subject, prompts, steps, before)
    assert all(map(is_sound, [*before.scores.values(), *after.scores.values()]))


def test_it_needs_answers_and_other_prompts(subject: Subject, prompts: PromptSet) -> None:
    with pytest.raises(UserError, match="put the step behavior before"):
        relevance(ScorerContext(subject, prompts, None, Measurement(records=SAID.records[:1])))
    alone = PromptSet({"target": prompts["target"], "control": prompts["control"][:1]})
    with pytest.raises(UserError, match="give two or more"):
        relevance(ScorerContext(subject, alone, None, SAID))
