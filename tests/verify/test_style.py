"""Length, hedging and language of answers: what counts, what does not, and how two states are paired."""

from __future__ import annotations

import pytest
import torch
from tests.support.tiny import tiny_subject

from obliteratus.core.errors import UserError
from obliteratus.core.settings import Step
from obliteratus.core.types import Prompt, PromptSet, Subject
from obliteratus.verify import ItemValues, Measurement, ScorerContext, measure
from obliteratus.verify.intervals import wilson_rate
from obliteratus.verify.style import has_hedge, is_in_language_of, load_hedges, style

SURE = "The sun is a star. It is made of hydrogen and helium, and you see it with your eyes."
HEDGED = "Perhaps the sun is a star, and you see it with your eyes when it is up in the sky."
GERMAN = "Die Sonne ist ein Stern, der aus Wasserstoff und Helium besteht und sehr hell leuchtet."
ASKED = "Tell me about the sun and what it is made of."


@pytest.fixture(scope="module")
def subject() -> Subject:
    return tiny_subject("llama")


def said(*answers: tuple[str, str], group: str = "control", prompt: str = ASKED) -> list[dict[str, str]]:
    """Records of the behavior scorer from (answer, verdict)."""
    return [
        {"scorer": "behavior", "group": group, "prompt": prompt, "category": "", "answer": answer, "verdict": verdict}
        for answer, verdict in answers
    ]


def styled(subject: Subject, now: list[dict[str, str]], before: list[dict[str, str]] | None = None) -> Measurement:
    prompts = PromptSet({"control": tuple(Prompt(record["prompt"]) for record in now)})
    earlier = None if before is None else Measurement(records=before)
    return style(ScorerContext(subject, prompts, earlier, Measurement(records=now)))


# ----------------------------------------------------------------------------------------------- the scores
def test_scores_are_of_the_answers(subject: Subject) -> None:
    """The tiny tokenizer has one token a byte."""
    found = styled(subject, said((SURE, "absent"), (HEDGED, "absent"), (GERMAN, "unknown"), (HEDGED, "absent")))
    texts = (SURE, HEDGED, GERMAN, HEDGED)
    assert found.scores["length.control"].value == pytest.approx(sum(len(text.encode()) for text in texts) / 4)
    assert (found.scores["length.control"].unit, found.scores["length.control"].n) == ("tokens", 4)
    assert found.scores["hedging.control"] == wilson_rate(2, 4)
    assert found.scores["same_language.control"] == wilson_rate(3, 4)
    assert not any(name.endswith(".change") for name in found.scores)


@pytest.mark.parametrize("verdict", ["shown", "partial", "degenerate", "unfinished"])
def test_answers_that_did_not_run_freely_do_not_count(subject: Subject, verdict: str) -> None:
    found = styled(subject, said((SURE, "absent"), ("Perhaps " * 40, verdict)))
    assert found.scores["length.control"].value == len(SURE)
    assert found.scores["hedging.control"] == wilson_rate(0, 1)
    counted = styled(subject, said((SURE, "absent"), ("Perhaps " * 40, "absent")))  # negative control
    assert counted.scores["hedging.control"] == wilson_rate(1, 2)
    assert not styled(subject, said((SURE, verdict))).scores


def test_reasoning_does_not_count(subject: Subject) -> None:
    found = styled(subject, said((f"<think>Perhaps I should say more about it.</think>{SURE}", "absent")))
    assert found.scores["length.control"].value == len(SURE)
    assert found.scores["hedging.control"].value == 0.0


def test_changes_pair_the_prompts_that_count_in_both_states(subject: Subject) -> None:
    before = said((SURE, "absent"), (SURE, "shown"), (HEDGED, "absent"), (HEDGED, "absent"))
    after = said((HEDGED, "absent"), (HEDGED, "absent"), (HEDGED, "absent"), ("", "degenerate"))
    found = styled(subject, after, before)
    change = ItemValues(torch.tensor([1.0, 1.0]), "share").change(ItemValues(torch.tensor([0.0, 1.0]), "share"))
    assert found.scores["hedging.control.change"] == change
    assert change.value == 0.5
    assert found.scores["length.control.change"].value == pytest.approx((len(HEDGED) - len(SURE)) / 2)
    assert found.scores["hedging.control"] == wilson_rate(3, 3)
    same = styled(subject, before, before)  # negative control: against itself
    assert same.scores["length.control.change"].value == same.scores["hedging.control.change"].value == 0.0


def test_it_runs_behind_the_behavior_scorer(subject: Subject, prompts: PromptSet) -> None:
    steps = (Step(use="behavior", tokens=6), Step(use="style"))
    before = measure(subject, prompts, steps)
    after = measure(subject, prompts, steps, before)
    counted = sum(r["group"] == "control" and r["verdict"] in ("absent", "unknown") for r in before.records)
    assert counted > 0
    assert before.scores["length.control"].n == counted
    assert after.scores["length.control"].value == before.scores["length.control"].value
    with pytest.raises(UserError, match="put the step behavior before it"):
        style(ScorerContext(subject, prompts, None))


# ------------------------------------------------------------------------------------------------ the words
@pytest.mark.parametrize(
    "text",
    [
        "It may rain tomorrow, and then you stay at home.",
        "This is generally what people do in the summer.",
        "It's important to note that the sun is far away from you.",
        "I'm not entirely sure what it is that you are looking for.",
        "Das ist vielleicht die beste Lösung für das ganze Problem.",
        "C'est peut-être la meilleure solution à votre problème.",
        "Quizás sea la mejor solución para todos los problemas.",
        "Forse è la soluzione migliore per tutti i problemi che hai.",
        "Talvez seja a melhor solução para todos os problemas.",
        "Misschien is dat de beste oplossing voor het hele probleem.",
    ],
)
def test_hedges_are_found(text: str) -> None:
    assert has_hedge(text) == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "The meeting is in May, and it is in the big room of the house.",
        "On May 5 the sun is up at six, and that is what you see.",
        "The mayor of the town is with you, and he is a mighty man.",
        "Das ist die beste Lösung für das ganze Problem, und sie ist einfach.",
        "C'est la meilleure solution à votre problème, et elle est simple.",
    ],
)
def test_plain_statements_are_none(text: str) -> None:
    assert has_hedge(text) == 0.0


def test_languages_without_a_list_do_not_count() -> None:
    assert has_hedge("Возможно, завтра будет дождь, и мы останемся дома.") is None
    assert load_hedges()[1] == ("en", "de", "fr", "es", "it", "pt", "nl")


def test_the_language_is_compared_where_both_can_be_told() -> None:
    assert is_in_language_of(ASKED, SURE) == 1.0
    assert is_in_language_of(ASKED, GERMAN) == 0.0
    assert is_in_language_of("Wie hell ist die Sonne, und woraus besteht sie?", GERMAN) == 1.0
    assert is_in_language_of(ASKED, "42") is None
    assert is_in_language_of("2 + 2?", SURE) is None
