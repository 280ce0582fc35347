"""Loops: answers that repeat themselves and say nothing, also where they count or vary on the way."""

from __future__ import annotations

import re

# The same 2-60 characters six times over. Numbers alone must be an outline that never comes to its text ("1. 1.1 2.
# 1.2 …"): "2, 4, 6, 8 …" is an answer.
REPEATED = re.compile(r"(.{2,60}?)\1{5,}", re.DOTALL)
OUTLINE = re.compile(r"(?:\b0\. 0\.0\s*){6}")
# Fewer than one distinct word in five is a loop; below 20 words ordinary short answers repeat themselves too.
DISTINCT, ENOUGH_WORDS = 0.2, 20
# The last words of an answer, which end it as a loop if few of them are new; short answers have no such end.
TAIL_WORDS, TAIL_DISTINCT = 24, 0.34
NUMBER = re.compile(r"\d+")
RULE = re.compile(r"[-=_.·•|+~ \t\u2500-\u257f]{4,}")


def is_loop(folded: str) -> bool:
    """Return whether folded text is a loop.

    Numbers count as one word, so counting on does not hide a loop; rules and dotted lines are left out.
    """
    text = RULE.sub(" ", NUMBER.sub("0", folded))
    words = re.findall(r"\w+", text)
    if OUTLINE.search(text) or any(re.search(r"[^\W\d_]", unit[1]) for unit in REPEATED.finditer(text)):
        return True
    if len(words) >= ENOUGH_WORDS and len(set(words)) < DISTINCT * len(words):
        return True
    tail = [word for word in words if word != "0"][-TAIL_WORDS:]
    return len(tail) == TAIL_WORDS and len(set(tail)) < TAIL_DISTINCT * TAIL_WORDS
