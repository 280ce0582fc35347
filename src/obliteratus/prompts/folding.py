"""The words of a prompt without what two spellings of one prompt differ in."""

from __future__ import annotations

import unicodedata
from functools import lru_cache

import regex

from obliteratus.core.types import Prompt

Words = tuple[str, ...]

# Scripts that put no spaces between words: each of their characters counts as a word.
UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"
# Signs that are read as words stay: "C#" is not "C", and "2 + 2" is not "2 = 2". Emoji are signs too.
WORD = regex.compile(rf"{UNSPACED}|(?:(?!{UNSPACED})[\p{{L}}\p{{M}}\p{{N}}])+|[\p{{So}}\p{{Sm}}\p{{Sc}}#%&@/]")
# Accents of Latin, Greek and Cyrillic letters. Other scripts write vowels with marks, which have to stay.
ACCENTS = regex.compile("[\u0300-\u036f]")
APOSTROPHE = regex.compile(r"(?<=\p{L})['’](?=\p{L})")


@lru_cache(maxsize=2**17)  # a prompt is folded when it is checked, when it is split, and again for the next run
def fold_words(text: str) -> Words:
    """Return the words of a text without case, accents and punctuation; a text without words is one word."""
    folded = text.casefold()
    if not folded.isascii():
        folded = unicodedata.normalize("NFKC", ACCENTS.sub("", unicodedata.normalize("NFKD", folded)))
    found = WORD.findall(APOSTROPHE.sub("", folded))
    return tuple(found) or (" ".join(folded.split()),)


def fold_prompt(prompt: Prompt) -> tuple[tuple[str, ...], Words]:
    """Return what near duplicates have in common: the turns before, and the folded words."""
    return prompt.context, fold_words(prompt.text)
