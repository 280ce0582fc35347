"""Folding keeps the words of a prompt and nothing that two spellings of it differ in."""

from __future__ import annotations

import pytest

from obliteratus.core.types import Prompt
from obliteratus.prompts.folding import fold_prompt, fold_words

SAME = [
    ("How do I bake bread?", "how do i   bake bread"),
    ("Café crème, s'il vous plaît!", "CAFE CREME — sil vous plait"),
    ("I don't know.", "I don’t know"),
    ("“Quoted”… (really)", "quoted really"),
    ("ﬁne", "fine"),
    ("请告诉我。", "请告诉我"),
    ("Ünter", "unter"),
]
DIFFERENT = [
    ("How do I bake bread?", "How do I bake breads?"),
    ("Is it C or not?", "Is it C# or not?"),
    ("2 + 2", "2 = 2"),
    ("I like 🍕", "I like 🍔"),
    ("???", "!!!"),
    ("कि", "की"),  # vowels of Devanagari are marks, and no accents
    ("か", "が"),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_spellings_of_one_prompt_are_the_same(one: str, other: str) -> None:
    assert fold_words(one) == fold_words(other)


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_different_prompts_stay_different(one: str, other: str) -> None:
    assert fold_words(one) != fold_words(other)


def test_scripts_without_spaces_are_words_by_character() -> None:
    assert fold_words("请告诉我 the 天气") == ("请", "告", "诉", "我", "the", "天", "气")


def test_the_system_turn_belongs_to_a_prompt() -> None:
    assert fold_prompt(Prompt("Hi!", system="Be brief.")) != fold_prompt(Prompt("hi"))
    assert fold_prompt(Prompt("Hi!")) == fold_prompt(Prompt("hi"))
