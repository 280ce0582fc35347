"""A conversation remembers what was said and under which setting, and survives whatever goes wrong in a turn."""

from __future__ import annotations

import pytest
from tests.support.plans import random_plan
from tests.support.tiny import tiny_subject

from obliteratus.core.chat import Turn
from obliteratus.core.errors import UserError
from obliteratus.core.types import Subject
from obliteratus.excise.plan import save_plan
from obliteratus.inference.stream import AnswerLimits
from obliteratus.serve.conversation import Conversation, to_markdown
from obliteratus.serve.dial import Answer, Dial

LIMITS = AnswerLimits(tokens=6)


@pytest.fixture
def subject() -> Subject:
    return tiny_subject("llama")


@pytest.fixture
def talk(subject: Subject) -> Conversation:
    plans = {"a": random_plan(subject, seed=1, strength=1.5), "b": random_plan(subject, seed=2, strength=1.5)}
    return Conversation(subject, plans, limits=LIMITS)


def finish(answer: Answer) -> str:
    return "".join(answer)


def test_each_turn_sees_those_before_it(talk: Conversation) -> None:
    talk.system = "Be kind."
    first = finish(talk.ask("One?"))
    second = finish(talk.ask("Two?"))
    said = [Turn("system", "Be kind."), Turn("user", "One?")]
    dial = Dial(talk.subject, talk.plans["a"])
    assert first == finish(dial.stream(said, 1.0, LIMITS))
    said += [Turn("assistant", first), Turn("user", "Two?")]
    assert second == finish(dial.stream(said, 1.0, LIMITS))


def test_retry_answers_in_place_at_the_strength_chosen_now(talk: Conversation) -> None:
    finish(talk.ask("One?"))
    before = finish(talk.ask("Two?"))
    talk.set_strength(0.0)
    after = finish(talk.retry())
    assert after != before
    assert [e.question for e in talk.exchanges] == ["One?", "Two?"]
    assert [e.setting for e in talk.exchanges] == ["a at strength 1", "unedited"]
    talk.set_strength(1.0)
    assert finish(talk.retry()) == before


def test_the_unedited_answer_stands_beside_and_the_conversation_goes_on_from_the_other(talk: Conversation) -> None:
    edited = finish(talk.ask("One?"))
    unedited = finish(talk.answer_unedited())
    assert unedited == finish(Dial(talk.subject).stream([Turn("user", "One?")], limits=LIMITS)) != edited
    finish(talk.ask("Two?"))
    assert talk._turns(talk.exchanges, "")[1] == Turn("assistant", edited)


def test_plans_are_chosen_by_name_or_folder(talk: Conversation, tmp_path: object) -> None:
    answers = {}
    for name in ("a", "b"):
        talk.use_plan(name)
        answers[name] = finish(talk.ask("One?"))
        talk.exchanges.clear()
    assert answers["a"] != answers["b"]
    save_plan(talk.plans["a"], f"{tmp_path}/third")
    talk.use_plan(f"{tmp_path}/third")
    assert talk.active == "third"
    assert finish(talk.ask("One?")) == answers["a"]


def test_what_fails_leaves_the_conversation_as_it_was(talk: Conversation, tmp_path: object) -> None:
    first = finish(talk.ask("One?"))
    save_plan(random_plan(tiny_subject("llama", seed=3)), f"{tmp_path}/other")
    for fail in (
        lambda: talk.use_plan("c"),
        lambda: talk.use_plan(str(tmp_path)),
        lambda: talk.use_plan(f"{tmp_path}/other"),
        lambda: talk.set_strength(3.0),
        lambda: talk.ask("x" * 400),
    ):
        with pytest.raises(UserError):
            fail()
    assert (talk.active, talk.strength, list(talk.plans)) == ("a", 1.0, ["a", "b"])
    assert [(e.question, e.answer.text) for e in talk.exchanges] == [("One?", first)]
    assert finish(talk.retry()) == first


def test_an_answer_stopped_before_it_began_takes_the_question_back(talk: Conversation) -> None:
    first = finish(talk.ask("One?"))
    talk.ask("Two?").close()
    assert talk.last().question == "One?"
    talk.retry().close()
    assert talk.last().answer.text == first
    answer = talk.ask("Three?")
    piece = next(answer)
    answer.close()
    assert talk.last().answer.text == piece  # what was written stays


def test_there_must_be_a_question_and_a_plan(subject: Subject) -> None:
    talk = Conversation(subject, {})
    for call in (talk.retry, talk.answer_unedited, talk.last):
        with pytest.raises(UserError, match="nothing was asked yet"):
            call()
    with pytest.raises(UserError, match="no plan whose strength"):
        talk.set_strength(0.5)


def test_each_draw_is_another_and_the_unedited_answer_uses_the_same(subject: Subject) -> None:
    talk = Conversation(subject, {}, limits=AnswerLimits(12, temperature=1.0))
    first = finish(talk.ask("One?"))
    assert finish(talk.answer_unedited()) == first  # there is no plan, so only the draws could differ
    assert finish(talk.retry()) != first


def test_the_file_tells_under_which_setting_each_answer_was_written(talk: Conversation) -> None:
    finish(talk.ask("One?"))
    talk.set_strength(0.5)
    finish(talk.ask("Two?"))
    finish(talk.answer_unedited())
    text = to_markdown(talk)
    parts = ["tiny:llama", "One?", "Answer, a at strength 1", "Two?", "Answer, a at strength 0.5", "unedited model"]
    places = [text.index(part) for part in parts]
    assert places == sorted(places)
    assert all(e.answer.text in text for e in talk.exchanges)
