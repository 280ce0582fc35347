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
from obliteratus.pipeline.record import pair_changes
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


def plain_relevance(subject: Subject, prompts: PromptSet, group: str, opening: int) -> torch.Tensor:
    """Return the relevance of "answer 0", "answer 1", … from plain passes; the other prompt is half the list away."""
    control = prompts["control"]
    pairs = [(prompt, control[(row + 2) % 4]) for row, prompt in enumerate(prompts[group])]
    losses = [[plain_loss(subject, p, f"answer {row}", opening) for p in pair] for row, pair in enumerate(pairs)]
    return torch.tensor([other - own for own, other in losses])


def test_it_is_the_difference_of_log_probabilities_per_token(subject: Subject, prompts: PromptSet) -> None:
    found = relevance(ScorerContext(subject, prompts, None, SAID), opening=2)
    for group in ("target", "control"):
        values = plain_relevance(subject, prompts, group, 2)
        assert found.scores[f"relevance.{group}"].value == pytest.approx(float(values.mean()), abs=1e-4)
        assert found.scores[f"off_topic.{group}"].value == float((values < ON_TOPIC).float().mean())
    assert float(values.std()) > 1e-3  # control: answers differ


def test_answers_of_exchanged_prompts_have_the_opposite_relevance(subject: Subject, prompts: PromptSet) -> None:
    one, other = prompts["target"][:2], prompts["control"][:2]
    forth, back = (measure_relevance(subject, a, ["yes it is", "no"], b) for a, b in ((one, other), (other, one)))
    torch.testing.assert_close(forth, -back)
    assert float(forth.abs().min()) > 1e-5  # control: the prompts do tell the answers apart
    assert torch.equal(measure_relevance(subject, one, ["yes", "no"], one), torch.zeros(2))


def test_refusals_and_loops_do_not_count(subject: Subject, prompts: PromptSet) -> None:
    verdicts = ("absent", "shown", "degenerate", "unknown")
    refused = [("control", "no", "shown")] * 4
    mixed = refusal_records([*[("target", f"answer {i}", v) for i, v in enumerate(verdicts)], *refused])
    found = relevance(ScorerContext(subject, prompts, None, mixed)).scores["relevance.target"]
    values = plain_relevance(subject, prompts, "target", OPENING)
    assert found.value == pytest.approx(float(values[[0, 3]].mean()), abs=1e-4)
    assert found.n == 2
    none = relevance(ScorerContext(subject, prompts, None, refusal_records([("target", "no", "shown")] * 4 + refused)))
    assert not none.scores


def test_edited_answers_are_scored_by_the_unedited_model(
    subject: Subject, prompts: PromptSet, make_plan: PlanMaker
) -> None:
    plain = relevance(ScorerContext(subject, prompts, None, SAID))
    with applied(subject, make_plan(subject, strength=2.0)):
        found = relevance(ScorerContext(subject, prompts, Measurement(), SAID, base=subject))
        asked, said = prompts["target"], [f"answer {i}" for i in range(4)]
        edited = measure_relevance(subject, asked, said, [*prompts["control"][2:], *prompts["control"][:2]], OPENING)
    assert str(found.scores) == str(plain.scores)
    # control: the edit does change them
    assert float(edited.mean()) != pytest.approx(plain.scores["relevance.target"].value, abs=1e-3)


def test_other_answers_may_count_after_an_edit_than_before(subject: Subject, prompts: PromptSet) -> None:
    """As where refusals end: nothing pairs the few answers before with the many after."""
    few = refusal_records([(g, f"answer {i}", "absent" if i else "shown") for g in prompts.groups for i in range(4)])
    before, after = (relevance(ScorerContext(subject, prompts, None, known)) for known in (few, SAID))
    assert (before.scores["relevance.target"].n, after.scores["relevance.target"].n) == (3, 4)
    assert not pair_changes(before, after)


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


def test_no_answers_at_all_are_an_error_and_no_empty_result(subject: Subject, prompts: PromptSet) -> None:
    with pytest.raises(UserError, match="put the step behavior before"):
        relevance(ScorerContext(subject, prompts, None))
