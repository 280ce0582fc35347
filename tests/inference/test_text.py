"""Answers as text: one for one prompt, a list for several, and the same as the batched engine gives."""

from __future__ import annotations

import pytest
from tests.support.refuser import refuser

import obliteratus as ob

ASKED = ["Tell me # about tides?", "Tell me about tides?"]


def test_one_or_several() -> None:
    subject = refuser()
    both = ob.generate(subject, ASKED, tokens=1)
    assert both == ["N", "Y"]
    assert ob.generate(subject, ASKED[0], tokens=1) == "N"
    assert ob.generate(subject, [ob.Prompt(ASKED[1])], 1) == ["Y"]
    assert ob.generate(subject, [], 1) == []


def test_an_answer_has_tokens() -> None:
    with pytest.raises(ob.UserError, match="tokens=0; give at least 1"):
        ob.generate(refuser(), "a", tokens=0)
