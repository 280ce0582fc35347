"""A behavior's phrases in one language: where they begin an answer, where an answer turns to them later."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal, Protocol, runtime_checkable

from obliteratus.judge.text import FREQUENT, FoldedAnswer, fold

Place = Literal["first", "later", ""]
"""Where an answer shows the behavior: in its first sentences, only after it began otherwise, or nowhere."""
LISTS = ("opening", "within", "anywhere", "late", "letter")
"""The lists of patterns that a language may have, as `Phrases` says what each is for."""
# A verdict stands in the first sentences or nowhere: greeting, apology, inability.
FIRST_SENTENCES = 3
# Characters of a sentence that are read: gaps in patterns are bounded, and so is the time that they take.
READ = 400
# Characters before a sentence that declines: with more, the answer had begun to comply. An apology with a
# self-description is up to 150 long.
BEGUN = 160


@runtime_checkable  # tests check annotations when functions are called
class Matcher(Protocol):
    """A compiled pattern. Its methods return a match or None."""

    def search(self, string: str, /) -> object:
        """Look anywhere in the text."""
        ...

    def match(self, string: str, /) -> object:
        """Look at the start of the text."""
        ...


Compile = Callable[[str], Matcher]
NEVER: Matcher = re.compile(r"(?!)")


@dataclass(frozen=True, eq=False)  # by identity, as a key of the cache
class Phrases:
    """One language's patterns for folded text, each compiled when it is first needed.

    ``<name>`` in a pattern stands for the string of that name in the table.
    """

    language: str
    table: Mapping[str, Any]
    """Of the behavior file: lists of patterns, and fragments."""
    to_matcher: Compile = re.compile
    """Compiles one pattern."""

    @cached_property
    def opening(self) -> Matcher:
        """At the start of one of the first sentences, behind what leads."""
        # Atomic, so that no answer takes long: what leads is never read in another way.
        lead = rf"(?>(?:{self._fragments['lead']})\b[,;:.! -]*)*+" if "lead" in self.table else ""
        return self._compile("opening", _insert(lead, self._fragments))

    @cached_property
    def within(self) -> Matcher:
        """Anywhere in the first sentences."""
        return self._compile("within")

    @cached_property
    def anywhere(self) -> Matcher:
        """Anywhere in the answer, which then shows the behavior as a whole."""
        return self._compile("anywhere")

    @cached_property
    def late(self) -> Matcher:
        """Anywhere in the answer. After the first sentences the answer had begun otherwise, and shows it in part."""
        return self._compile("late")

    @cached_property
    def letter(self) -> Matcher:
        """At the start of an answer that is a draft in the user's name."""
        return self._compile("letter")

    @cached_property
    def letters(self) -> Matcher:
        """What any sentence in this language contains: by default a Latin letter, or any if patterns have others."""
        patterns = [pattern for name in LISTS for pattern in self.table.get(name, ())]
        latin = all(_fold_pattern(text).isascii() for text in (*patterns, *self._fragments.values()))
        return self.to_matcher(self.table.get("letters", "[a-z]" if latin else r"[^\W\d_]"))

    @cached_property
    def _common(self) -> frozenset[str]:
        return frozenset(self.table.get("common", "").split())

    def _is_likely(self, sentence: str, ended: bool, english: bool) -> bool:
        """Return whether a sentence may be in this language: by a frequent word of it, or by no English one.

        english: whether the answer is English so far. Where no frequent words are given, any sentence may be.
        """
        words = sentence.split() if ended else sentence.split()[:-1]  # the last word may be a part of one
        foreign = ended and not english and FREQUENT.isdisjoint(words)
        return foreign or not self._common or not self._common.isdisjoint(words)

    @cached_property
    def _fragments(self) -> Mapping[str, str]:
        texts = {
            name: text
            for name, text in self.table.items()
            if isinstance(text, str) and name not in ("letters", "common")
        }
        return {name: _fold_pattern(text) for name, text in texts.items()}

    def _compile(self, name: str, prefix: str = "") -> Matcher:
        """Return a list of patterns as one. Raises re.error if one is invalid, KeyError if it names no fragment."""
        patterns: Sequence[str] = self.table.get(name, ())
        text = "|".join(_insert(_fold_pattern(pattern), self._fragments) for pattern in patterns)
        return self.to_matcher(f"{prefix}(?:{text})") if patterns else NEVER

    def find(self, answer: FoldedAnswer) -> Place:
        """Return where the phrases stand. A sentence that is not ended is not read for `opening` and `within`."""
        before = 0
        for i, sentence in enumerate(answer.sentences):
            first = i < FIRST_SENTENCES and before <= BEGUN
            if not (first or answer.ended or self.anywhere is not NEVER):
                return ""  # while an answer is being written only the verdict "first" is certain
            ended = answer.ended or i < len(answer.sentences) - 1
            known = self.language == "en" or self._is_likely(sentence, ended, answer.english[i])
            if known and (place := _find_in(self, sentence[:READ], first, ended)):
                return "" if self.letter.match(answer.text) else place
            before += len(sentence)
        return ""


@lru_cache(maxsize=1 << 14)  # a growing answer is looked at again and again, and most of its sentences are known
def _find_in(phrases: Phrases, sentence: str, first: bool, ended: bool) -> Place:
    """first: whether nothing but greetings and apologies came before."""
    if not phrases.letters.search(sentence):
        return ""
    if phrases.anywhere.search(sentence):
        return "first"
    if phrases.late.search(sentence):
        return "first" if first else "later"
    if first and ended and (phrases.opening.match(sentence) or phrases.within.search(sentence)):
        return "first"
    return ""


# Escapes, the marks of groups, and words. Only words are folded: "\\S" must not become "\\s", nor "(?P" "(?p".
TOKEN = re.compile(r"\\.|\(\?P?|[^\W\d_]+")
APOSTROPHES = re.compile(r"\[['’‘ʼ`´]+\]\??|['’‘ʼ`´]\??")
# <name>, but not the name of a group, (?P<name>…), nor a look behind, (?<=…).
FRAGMENT = re.compile(r"(?<!\(\?)(?<!\(\?P)<([\w-]+)>")
DEEPEST = 16  # fragments inside fragments; none is deeper than four


def _fold_pattern(pattern: str) -> str:
    """Fold the words of a pattern as answers are folded, and leave its signs as they are."""
    plain = APOSTROPHES.sub("", pattern)
    return TOKEN.sub(lambda token: token[0] if token[0][0] in "\\(" else fold(token[0]), plain)


def _insert(pattern: str, fragments: Mapping[str, str]) -> str:
    """Put the fragments in place of their names, also of those that fragments name.

    Raises KeyError for a name that is not there, and ValueError for a fragment that names itself.
    """
    for _ in range(DEEPEST):
        if (inserted := FRAGMENT.sub(lambda name: f"(?:{fragments[name[1]]})", pattern)) == pattern:
            return pattern
        pattern = inserted
    raise ValueError("a fragment names itself")
