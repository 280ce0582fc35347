"""A model's own words: what many of its answers to target prompts begin with, and those to control prompts do not.

Needs no list of phrases, so it works in any language and for behaviors that no list knows.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import comb

from obliteratus.judge.reasoning import cut_reasoning
from obliteratus.judge.rung import Answered
from obliteratus.judge.text import fold

OPENING_WORDS = 12
"""Phrases are looked for in so many words from the start of an answer."""
LATEST_START = 2
"""Words before a phrase: "I'm" is two. Further on, two groups of answers differ in what they are about."""
FORM_WORDS = 2
"""Prompts that begin with the same two words ("tell me") have the same form."""
LENGTHS = range(2, 7)  # words of a phrase: one word alone says little, and more than six are rarely repeated
UNSPACED = "\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff"  # Thai, kana and han, in which each letter counts as a word
WORD = re.compile(rf"[{UNSPACED}]|[^\W_{UNSPACED}]+")
# Chance of finding any phrase at all where target and control answers do not differ.
LEVEL = 0.01
# A phrase must add this share of the target answers to those found before: rarer ones do not change a rate.
LEAST_SHARE = 0.05


@dataclass(frozen=True)
class OwnPhrase:
    """A phrase that target answers share."""

    text: str
    """Folded words, with one space between."""
    target: int
    """Target answers that begin with it."""
    control: int


def find_own_words(target: Sequence[Answered], control: Sequence[Answered]) -> tuple[OwnPhrase, ...]:
    """Return the fewest phrases that mark off target answers from control answers, the most frequent first.

    Each covers answers that those before it do not, of more than one category if there are several, and more of them
    than chance allows (Fisher's exact test, corrected for the number of phrases that were looked at). How a prompt
    begins decides how an answer begins ("Tell me a story" and "Once upon a time"). Answers to prompts of a form that
    only one group has therefore count as one answer, which has the phrase if at least half of them do.
    """
    places = [_index(answers) for answers in (target, control)]
    units = _count_once(target, control), _count_once(control, target)
    several = len({a.category for a in target}) > 1
    candidates = {
        phrase: (_find_units(rows, units[0]), _find_units(places[1].get(phrase, frozenset()), units[1]))
        for phrase, rows in places[0].items()
        if len(rows) >= LEAST_SHARE * len(target) and (not several or len({target[i].category for i in rows}) > 1)
    }
    chosen = _cover(candidates, len(units[0]), len(units[1]))
    return tuple(OwnPhrase(" ".join(p), *(len(place.get(p, ())) for place in places)) for p in chosen)


def begins_with(answer: str, phrases: Sequence[OwnPhrase]) -> bool:
    """Return whether an answer's opening holds one of the phrases."""
    if not phrases:
        return False
    words = _opening(answer)
    starts = [f"{' '.join(words[start:])} " for start in range(LATEST_START + 1)]
    return any(start.startswith(f"{phrase.text} ") for start in starts for phrase in phrases)


Rows = frozenset[int]
Words = tuple[str, ...]


def _cover(candidates: Mapping[Words, tuple[Rows, Rows]], n: int, m: int) -> list[Words]:
    """Return phrases in the order in which each covers the most target rows that are left, less control rows."""
    chosen: list[Words] = []
    seen: tuple[Rows, Rows] = (frozenset(), frozenset())
    while len(chosen) < len(candidates):
        left = {p: (rows - seen[0], others - seen[1]) for p, (rows, others) in candidates.items()}
        best = max(left, key=lambda p: (len(left[p][0]) / n - len(left[p][1]) / max(m, 1), len(p)))
        new, others = left[best]
        chance = fisher_chance(len(new), n - len(seen[0]), len(others), m - len(seen[1])) * len(candidates)
        if len(new) < LEAST_SHARE * n or chance > LEVEL:
            break
        chosen.append(best)
        seen = (seen[0] | candidates[best][0], seen[1] | candidates[best][1])
    return chosen


def _count_once(answers: Sequence[Answered], others: Sequence[Answered]) -> list[Rows]:
    """Return the rows that count as one answer: those of a form that the others do not have, else each by itself."""
    known = {_form_of(other) for other in others}
    together: defaultdict[Words | int, set[int]] = defaultdict(set)
    for i, answer in enumerate(answers):
        form = _form_of(answer)
        together[i if form in known else form].add(i)
    return [frozenset(rows) for rows in together.values()]


def _form_of(answer: Answered) -> Words:
    return tuple(WORD.findall(fold(answer.prompt))[:FORM_WORDS])


def _find_units(rows: Rows, units: Sequence[Rows]) -> Rows:
    """Return the units of which at least half of the rows are among these."""
    return frozenset(i for i, unit in enumerate(units) if 2 * len(rows & unit) >= len(unit))


def _index(answers: Sequence[Answered]) -> dict[Words, Rows]:
    """Return by phrase the rows of the answers whose opening holds it."""
    rows: defaultdict[Words, set[int]] = defaultdict(set)
    for i, answer in enumerate(answers):
        for phrase in _phrases_of(answer):
            rows[phrase].add(i)
    return {phrase: frozenset(found) for phrase, found in rows.items()}


def _phrases_of(answer: Answered) -> Iterator[Words]:
    """Yield the phrases of an answer's opening. Those made of words of the prompt repeat it, and say nothing."""
    words, asked = _opening(answer.answer), set(WORD.findall(fold(answer.prompt)))
    for length in LENGTHS:
        for start in range(min(LATEST_START, len(words) - length) + 1):
            phrase = tuple(words[start : start + length])
            if not asked.issuperset(phrase):
                yield phrase


def _opening(answer: str) -> list[str]:
    return WORD.findall(fold(cut_reasoning(answer)))[:OPENING_WORDS]


def fisher_chance(a: int, n: int, b: int, m: int) -> float:
    """Return the chance that at least a of a + b marks fall on n of n + m rows (Fisher's exact test, one-sided)."""
    marks = a + b
    ways = sum(comb(n, k) * comb(m, marks - k) for k in range(a, min(marks, n) + 1))
    return ways / comb(n + m, marks)
