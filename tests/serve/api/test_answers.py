"""Text up to a stop text: whole pieces add up to it, whatever the pieces are."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.tiny import tiny_subject

from obliteratus.inference.answers import AnswerDecoder
from obliteratus.serve.api.answers import StoppedText, WholeText

SUBJECT = tiny_subject("llama")
DECODER = AnswerDecoder.create(SUBJECT)


def push_all(text: Any, said: str) -> list[str]:
    """Push the tokens of what is said, which are its bytes, and return the pieces."""
    pieces = []
    for token in SUBJECT.tokenizer(said, add_special_tokens=False)["input_ids"]:
        pieces.append(text.push([token]))
        if text.stopped:
            return pieces
    return [*pieces, text.finish()]


@settings(deadline=None)  # the machine may do much else
@given(st.text("abc ", max_size=30), st.lists(st.text("abc ", min_size=1, max_size=4), max_size=4))
def test_pieces_add_up_to_the_text_before_the_stop_that_is_complete_first(text: str, stops: list[str]) -> None:
    ends = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    first = min(ends)[1] if ends else len(text)
    stopped = StoppedText(DECODER, stops)
    assert "".join(push_all(stopped, text)) == text[:first]
    assert stopped.stopped == any(stop in text for stop in stops)


def test_what_may_be_the_beginning_of_a_stop_is_held_back() -> None:
    stopped = StoppedText(DECODER, ["END"])
    assert push_all(stopped, "aENbEND!") == ["a", "", "", "ENb", "", "", ""]
    assert push_all(StoppedText(DECODER, ["END"]), "aEN")[-1] == "EN"


@pytest.mark.parametrize("text", ["", "é and ☄", "plain"])
def test_a_whole_text_is_decoded_once(text: str) -> None:
    assert push_all(WholeText(DECODER), text)[-1] == text
