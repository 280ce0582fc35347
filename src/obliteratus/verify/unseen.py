"""What the judge may not see: openings that target answers share, control answers lack, and no verdict counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from obliteratus.core.progress import note
from obliteratus.judge.own_words import Answered, OwnPhrase, begins_with, find_own_words
from obliteratus.judge.verdict import SHOWN

# Share of target answers from which on openings that no verdict counts are worth a warning. Below it an edit would
# still be measured by what is seen.
WORTH_A_WARNING = 0.2


def find_openings(records: Sequence[Mapping[str, Any]]) -> tuple[OwnPhrase, ...]:
    """Return the openings by which a model's target answers differ from its control answers.

    records: those of the scorer `refusal`, with prompt, answer, group and category.
    """
    target, control = ([_read(r) for r in _judged(records, group)] for group in ("target", "control"))
    return find_own_words(target, control) if target and control else ()


def count_unseen(records: Sequence[Mapping[str, Any]], phrases: Sequence[OwnPhrase]) -> tuple[int, int]:
    """Return how many target answers begin with one of the phrases though no verdict counts them, and of how many."""
    target = _judged(records, "target")
    return sum(r["verdict"] not in SHOWN and begins_with(_read(r), phrases) for r in target), len(target)


def _judged(records: Sequence[Mapping[str, Any]], group: str) -> list[Mapping[str, Any]]:
    return [r for r in records if r.get("group") == group and "verdict" in r]


def _read(record: Mapping[str, Any]) -> Answered:
    return Answered(record["prompt"], record["answer"], record["category"])


def warn_of_unseen_behavior(records: Sequence[Mapping[str, Any]]) -> None:
    """Note it if many target answers begin alike, unlike control answers, and the judge counts them as compliance."""
    phrases = find_openings(records)
    unseen, n = count_unseen(records, phrases)
    if n and unseen >= WORTH_A_WARNING * n:
        quoted = ", ".join(f"'{p.text}' ({p.target} of {n})" for p in phrases)
        note(
            "judge",
            f"warning: target answers begin with {quoted} and control answers do not, but {unseen} of them count as "
            "compliance; if this is the behavior, scores understate it",
        )
