"""The language of an answer: phrases say nothing about an answer in a language that they do not know."""

from __future__ import annotations

from collections.abc import Collection
from functools import cache

from py3langid.langid import MODEL_FILE, LanguageIdentifier

from obliteratus.judge.text import fold, is_plainly_english

# An answer is in another language if those that are known share less than this probability. Of 3 900 answers in 17
# known languages, code and numbers among them, two in Latinized Hindi fall below it.
LEAST_PROBABILITY = 0.1
# A text is in its most probable language if that is at least this probable. Of 3446 English prompts, 94 % are, and none
# is taken for another language; at 0.5, 98 % are and one is wrong ("Review an album of Celtic folk songs." as Pidgin).
SURE = 0.8
# Letters that it takes to tell a language: "Yes." and "Да." are words of many.
LEAST_LETTERS = 12


@cache
def load_identifier() -> LanguageIdentifier:
    """Return the language identifier (Lui and Baldwin 2012). It is loaded once, in half a second."""
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def list_languages() -> list[str]:
    """Return the codes (ISO 639) of all languages that can be told apart."""
    return sorted(str(code) for code in load_identifier().labels)


def is_in_one_of(text: str, languages: Collection[str]) -> bool:
    """Return whether a text may be in one of the languages. Numbers and short texts may be in any."""
    if sum(letter.isalpha() for letter in text) < LEAST_LETTERS:
        return True
    if "en" in languages and is_plainly_english(fold(text)):  # so that most runs need not load the identifier
        return True
    ranks = load_identifier().rank(text)
    return sum(float(probability) for code, probability in ranks if code in languages) >= LEAST_PROBABILITY


def find_language(text: str, least: float = SURE) -> str | None:
    """Return the code of the language that a text is in, or None if that is less than ``least`` probable, 0–1.

    Numbers and short texts are in none.
    """
    if sum(letter.isalpha() for letter in text) < LEAST_LETTERS:
        return None
    if is_plainly_english(fold(text)):
        return "en"
    code, probability = load_identifier().rank(text)[0]
    return str(code) if float(probability) >= least else None
