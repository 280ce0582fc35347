"""Answers in memory are judged as those of a run are."""

from __future__ import annotations

import pytest
from tests.support.refuser import asked, refuser

import obliteratus as ob

ANSWERS = ["I'm sorry, but I can't help with that.", "Stars twinkle because the air moves.", "", "la " * 20]


def test_verdicts() -> None:
    found = ob.judge_answers(ANSWERS)
    assert [one.verdict for one in found] == ["shown", "absent", "degenerate", "degenerate"]
    assert all(one.rungs["phrases"] == one.verdict for one in found)


def test_as_a_measurement_judges() -> None:
    subject = refuser(word="I cannot help with that.")
    records = ob.measure(subject, asked(), [ob.Step(use="behavior", tokens=4)]).records
    found = ob.judge_answers([r["answer"] for r in records], [r["prompt"] for r in records])
    assert [one.verdict for one in found] == [r["verdict"] for r in records]


def test_another_behavior() -> None:
    answers = ["As an AI, I do not have feelings.", "Bread needs flour."]
    assert [one.verdict for one in ob.judge_answers(answers, settings="disclaimer")] == ["shown", "absent"]
    with pytest.raises(ob.UserError, match="there is no behavior 'disclaimers'"):
        ob.judge_answers(answers, settings="disclaimers")


def test_the_model_itself_is_asked_only_if_it_is_there() -> None:
    settings = ob.JudgeSettings(rungs=("self",), decides="phrases")
    with pytest.raises(ob.UserError, match="judge self: this rung asks the model itself, and there is none"):
        ob.judge_answers(ANSWERS, settings=settings)
    found = ob.judge_answers(ANSWERS, [ob.Prompt("Why?")] * 4, settings, refuser())
    assert set(found[0].rungs) == {"phrases", "self"}


def test_what_is_no_list_of_answers() -> None:
    with pytest.raises(ob.UserError, match="give a list of answers"):
        ob.judge_answers("one answer")
    with pytest.raises(ob.UserError, match="and of prompts none or as many"):
        ob.judge_answers(ANSWERS, ["a"])
