"""An answer that turns to the behavior later is turned away there; one that does not is left alone."""

from __future__ import annotations

import re

import pytest
from tests.support.tiny import tiny_subject
from tests.support.tuning import plan_for

from obliteratus.core.types import Plan, Prompt, Subject
from obliteratus.excise.live.hooks import applied
from obliteratus.inference.answers import AnswerDecoder
from obliteratus.inference.chat_template import render_prompts
from obliteratus.inference.generate import generate
from obliteratus.judge.behavior import load_behavior
from obliteratus.judge.judge import Judge
from obliteratus.tune.relapses import BACK, KEPT, OPENING, find_first_sign, mend_relapses

BEGUN, WATCH = 18, 48


@pytest.fixture(scope="module")
def subject() -> Subject:
    return tiny_subject("llama")


def late_sign(subject: Subject, answers: list[list[int]]) -> tuple[str, int]:
    """Two characters that an answer first has some 30 tokens in, and the answer's number."""
    texts = [subject.tokenizer.decode(answer) for answer in answers]
    for i, text in enumerate(texts):
        for start in range(28, min(len(text) - 2, 40)):
            two = text[start : start + 2]
            if two.isprintable() and all(two not in other[:28] for other in texts):
                return two, i
    raise AssertionError("no answer has anything new after 28 characters; take another seed")


def test_an_answer_is_turned_where_it_relapses(subject: Subject) -> None:
    plan = plan_for(subject, "orthogonal", strength=3.0)
    ids = render_prompts(subject, [Prompt(f"Tell me about {x}?") for x in "abcdefgh"])
    whole = generate(subject, ids, WATCH)
    sign, number = late_sign(subject, whole)
    judge = Judge(load_behavior({"name": "sign", "about": "It shows the sign.", "written": [re.escape(sign)]}))
    pairs = [(row, answer[:BEGUN]) for row, answer in zip(ids, whole, strict=True)]
    shows = [find_first_sign(AnswerDecoder.create(subject), answer, judge) for answer in whole]
    found = mend_relapses(subject, pairs, plan, WATCH, judge)
    for pair, first, (row, answer), base in zip(pairs, shows, found, whole, strict=True):
        if first is None or answer == pair[1]:
            assert (row, answer) == pair
            continue
        turn = next(
            first - back for back in BACK if first - back > 0 and answer[: first - back] == base[: first - back]
        )
        turn = len(answer) - OPENING - KEPT if len(answer) > OPENING + KEPT else turn
        assert answer[:turn] == base[:turn]
        with applied(subject, plan):
            assert answer[turn : turn + OPENING] == generate(subject, [row + answer[:turn]], OPENING)[0]
        assert find_first_sign(AnswerDecoder.create(subject), answer, judge) is None
    assert shows[number] is not None
    assert found[number][1] != pairs[number][1]


def test_what_cannot_be_turned_stays(subject: Subject) -> None:
    """Negative control: a plan without edits writes what the model would write anyway."""
    ids = render_prompts(subject, [Prompt(f"Tell me about {x}?") for x in "abcdefgh"])
    whole = generate(subject, ids, WATCH)
    sign, _ = late_sign(subject, whole)
    judge = Judge(load_behavior({"name": "sign", "about": "It shows the sign.", "written": [re.escape(sign)]}))
    pairs = [(row, answer[:BEGUN]) for row, answer in zip(ids, whole, strict=True)]
    assert mend_relapses(subject, pairs, Plan((), subject.source.digest), WATCH, judge) == pairs


def test_the_first_sign_is_where_the_verdict_turns(subject: Subject) -> None:
    judge = Judge(load_behavior({"name": "sign", "about": "It shows the sign.", "written": ["zz"]}))
    tokens = subject.tokenizer("abcdefzzghi", add_special_tokens=False)["input_ids"]
    assert find_first_sign(AnswerDecoder.create(subject), tokens, judge) == 8
    assert find_first_sign(AnswerDecoder.create(subject), tokens[:7], judge) is None
