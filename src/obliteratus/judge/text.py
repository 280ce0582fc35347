"""Answers as a judge reads them: spelling folded, quotations cut out, split into sentences."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

# Letters that NFKD does not take apart, spellings of one sound, and all double quotes as one.
LETTERS = str.maketrans(
    {
        **dict(zip("ıłøđðþæœß", ("i", "l", "o", "d", "d", "th", "ae", "oe", "ss"), strict=True)),
        **dict.fromkeys("أإآٱ", "ا"),
        "ة": "ه",
        "ى": "ي",
        "ـ": "",
        "–": "-",
        "—": "-",
        "−": "-",
        "。": ".",
        "！": "!",
        "？": "?",
        "｡": ".",
        **dict.fromkeys("“”„«»「」『』〝〞", '"'),
        **dict.fromkeys("'’‘ʼ`´*_#>\\~", ""),  # apostrophes are often missing, and markdown is not read
    }
)
ACCENTS = re.compile("[\u0300-\u036f\u064b-\u065f\u0670]")  # of Latin, Greek and Cyrillic letters, and Arabic vowels
INVISIBLE = re.compile("[\u200b-\u200f\u2060\ufeff\u00ad]")
QUOTED = re.compile(r'"[^"]{2,600}"?')
# An apostrophe inside a word closes no quotation.
SINGLE_QUOTED = re.compile(r"(?<!\w)['‘](?:[^'’\n]|['’](?=\w)){3,300}['’](?!\w)")
DIALOGUE = re.compile(r"^\s*[—–―].*$", re.MULTILINE)  # a line of speech, as many languages write it
SENTENCE = re.compile(r"(?<=[.!?।؟。])\s*|\n+")

CLAUSE_END = re.compile(r"[,;:،、，；：]|\s-\s")


def fold(text: str) -> str:
    """Return text in lower case without accents, apostrophes and markdown, with one kind of double quote.

    Line breaks stay, runs of other spaces become one.
    """
    plain = unicodedata.normalize("NFKD", INVISIBLE.sub("", text).casefold())
    plain = unicodedata.normalize("NFC", ACCENTS.sub("", plain)).translate(LETTERS)
    return re.sub(r"[^\S\n]+", " ", plain).strip()


def cut_quotations(text: str) -> str:
    """Return folded text without what stands between quotes: whoever is quoted, it is not the answer's own word."""
    return QUOTED.sub('""', fold(DIALOGUE.sub('""', SINGLE_QUOTED.sub('""', text))))


# Words that no other language of the world's most used has ("the" is not one: Vietnamese "thể" is folded to it). At one
# word in ten a text is English, and is not searched for phrases of other languages, which takes five times as long.
ENGLISH = re.compile(
    r"\b(?:and|you|your|with|this|are|have|which|their|dont|cant|doesnt|isnt|ive|cannot|would|could|should|from|were|"
    r"what|when|about|(?:of|in|to|is|on|for|at|by) the|im (?:sorry|an?|not|just|here)|i (?:am|can|apologize))\b"
)
WORDS_A_MARK = 10


# Two different ones of these, at one word in six, are English too; other languages have one of them at most.
FREQUENT = frozenset("the to of is that and with as it you was this are in".split())  # noqa: SIM905
WORDS_A_FREQUENT_ONE = 6


def is_plainly_english(folded: str) -> bool:
    """Return whether a folded text is English without doubt."""
    words = folded.split()
    found = [word for word in words if word in FREQUENT]
    by_frequent_words = len(set(found)) > 1 and len(found) * WORDS_A_FREQUENT_ONE >= len(words)
    return by_frequent_words or len(ENGLISH.findall(folded)) * WORDS_A_MARK >= len(words)


@dataclass(frozen=True)
class FoldedAnswer:
    """An answer as phrases are looked for in it."""

    written: str
    """As it is written."""
    text: str
    """Folded, without quotations."""
    sentences: list[str]
    """Its statements, without the signs and digits that lists and headings begin with."""
    english: list[bool]
    """Of each sentence, whether the answer up to its end is plainly English."""
    ended: bool
    """Whether the last sentence is whole. While an answer is being generated it mostly is not."""


def fold_answer(text: str, ended: bool = True) -> FoldedAnswer:
    """Return the answer folded and split.

    Questions are left out: "Unable to sleep?" and "¿No puedes venir?" say nothing about the one who answers. What
    stands before the last comma stays: "I can't see it, could you describe it?"
    """
    folded = cut_quotations(text)
    statements = [_cut_question(part) for part in SENTENCE.split(folded)]
    sentences = [s for part in statements if (s := part.strip(' "-•:;,.!()[]0123456789'))]
    return FoldedAnswer(
        text,
        folded,
        sentences,
        [is_plainly_english(" ".join(sentences[: i + 1])) for i in range(len(sentences))],
        ended or folded.endswith((".", "!", "\n")),
    )


def _cut_question(sentence: str) -> str:
    if not sentence.rstrip(' ")').endswith(("?", "؟")):
        return sentence
    ends = list(CLAUSE_END.finditer(sentence))
    return sentence[: ends[-1].start()] if ends else ""
