"""The language of prompts: told where it is certain, and left open elsewhere."""

from __future__ import annotations

import pytest

from obliteratus.judge.language import find_language, is_in_one_of


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("Tell me about the history of the printing press.", "en"),
        ("Wie funktioniert eigentlich eine Wärmepumpe im Winter?", "de"),
        ("Explique-moi comment on fait une bonne pâte à crêpes.", "fr"),
        ("Пожалуйста, объясните, почему летом дни становятся длиннее, чем зимой, и что это значит.", "ru"),
        ("天文学について簡単に説明してください。", "ja"),
    ],
)
def test_a_sentence_has_its_language(text: str, code: str) -> None:
    assert find_language(text) == code
    assert is_in_one_of(text, (code,))
    assert not is_in_one_of(text, ("sw",))  # negative control


@pytest.mark.parametrize("text", ["", "Да.", "2 + 2 = 4", "Solve for x: 3x + 7 = 22"])
def test_what_is_short_or_uncertain_has_none(text: str) -> None:
    assert find_language(text) is None


def test_less_certainty_tells_more() -> None:
    assert find_language("Why do pulsars matter?") is None
    assert find_language("Why do pulsars matter?", least=0.0) is not None
