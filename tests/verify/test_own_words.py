"""A behavior that the judge has no words for is heard before anything is edited, and counts from then on."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.notes import Notes
from tests.support.refuser import asked, refuser, shuffled

from obliteratus.core.progress import report_to
from obliteratus.core.settings import JudgeSettings, Step
from obliteratus.judge.behavior import load_behavior
from obliteratus.judge.judge import Judge
from obliteratus.judge.rung import Answered
from obliteratus.verify import measure
from obliteratus.verify.ladder import hear_judge
from obliteratus.verify.own_words import (
    choose_own_words,
    find_openings,
    listen,
)

# The refuser says its one word over and over, so that an opening of six words holds it once and a half.
UNKNOWN, KNOWN = "Ach nee, geht nicht:", "I cannot help with that."
HEARD = "ach nee geht nicht ach nee"
WORDS = ("river", "lamp", "chair", "cloud", "pencil", "garden", "train", "window", "coffee", "letter", "wheel", "paper")


def answers(begin: str, n: int, of: int = 20) -> list[Answered]:
    """``of`` answers, of which n begin so and all go on in their own way."""
    return [
        Answered(f"What is {i}?", f"{begin if i < n else ''} {WORDS[i % 12]} and {WORDS[(7 * i + 3) % 12]} are {i}.")
        for i in range(of)
    ]


def test_an_unknown_refusal_is_heard_and_counted() -> None:
    subject, steps, notes = refuser(word=UNKNOWN), (Step(use="behavior", tokens=6),), Notes()
    assert measure(subject, asked(), steps).scores["refusal.target"].value == 0  # negative control: no phrase knows it
    with report_to(notes):
        judge = hear_judge(JudgeSettings(), subject, asked())
    assert [(p.text, p.target, p.control) for p in judge.own_words] == [(HEARD, 12, 0)]
    assert any(f"'{HEARD}' (12 of 12)" in note and "counted as refusal" in note for note in notes.texts)
    found = measure(subject, asked(), steps, judge=judge).scores
    assert (found["refusal.target"].value, found["refusal.control"].value) == (1, 0)


@pytest.mark.parametrize(("word", "mixed"), [(KNOWN, False), (UNKNOWN, True)])
def test_nothing_is_heard_where_phrases_know_it_or_groups_do_not_differ(word: str, mixed: bool) -> None:
    subject, prompts = refuser(word=word), shuffled(asked()) if mixed else asked()
    assert listen(subject, prompts, Judge()) == ()


def test_who_does_not_want_own_words_gets_none() -> None:
    settings = JudgeSettings(own_words=False)
    assert hear_judge(settings, refuser(word=UNKNOWN), asked()).own_words == ()
    marks = JudgeSettings(behavior="exclamation")  # seen by a mark, not by how an answer begins
    assert hear_judge(marks, refuser(word=UNKNOWN), asked()).own_words == ()


@pytest.mark.parametrize(
    ("target", "control", "heard"),
    [
        (answers(UNKNOWN, 12), answers("", 0), True),
        (answers(UNKNOWN, 5), answers("", 0), False),  # a quarter: too few to count unasked
        (answers(UNKNOWN, 12), answers(UNKNOWN, 1), False),  # control answers begin so too
        (answers("I'm sorry, I cannot do it:", 12), answers("", 0), False),  # the phrases know it
    ],
)
def test_openings_count_above_the_thresholds(target: list[Answered], control: list[Answered], heard: bool) -> None:
    assert bool(choose_own_words(target, control, Judge())) == heard


def test_a_behavior_without_any_phrase_is_judged_by_own_words_alone(tmp_path: Path) -> None:
    (tmp_path / "grumble.toml").write_text('about = "The answer grumbles."\n')
    judge = Judge(load_behavior(str(tmp_path / "grumble.toml")))
    assert judge.behavior.has_openings
    heard = hear_judge(JudgeSettings(behavior=str(tmp_path / "grumble.toml")), refuser(word=UNKNOWN), asked())
    assert heard.judge_answer(f"{UNKNOWN} {UNKNOWN}") == "shown"
    assert judge.judge_answer(f"{UNKNOWN} {UNKNOWN}") == "absent"


def test_reasoning_is_no_opening() -> None:
    """What every answer thinks first is not its own word for the behavior; what it says after that is."""
    think = "<think>Okay, the user wants it.</think>"
    target = [Answered(a.prompt, think + a.answer) for a in answers(UNKNOWN, 12)]
    control = answers("", 0)
    assert {p.text.split()[0] for p in choose_own_words(target, control, Judge())} <= {"ach", "nee"}
    plain = [Answered(a.prompt, think + a.answer) for a in answers("", 0)]
    assert choose_own_words(plain, control, Judge()) == ()


def test_nothing_was_answered() -> None:
    assert find_openings([]) == ()
    assert find_openings([{"group": "target", "prompt": "x"}]) == ()
