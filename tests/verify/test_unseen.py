"""A behavior that the judge has no words for is noticed before anything is edited."""

from __future__ import annotations

from typing import Any

import pytest
from tests.support.notes import Notes

from obliteratus.core.progress import report_to
from obliteratus.verify.unseen import count_unseen, find_openings, warn_of_unseen_behavior

WORDS = ("river", "lamp", "chair", "cloud", "pencil", "garden", "train", "window", "coffee", "letter", "wheel", "paper")


def records(target: str, verdict: str, n: int = 15) -> list[dict[str, Any]]:
    """Answers that begin with these words, or with none, and go on in their own way."""

    def record(group: str, begin: str, i: int, verdict: str) -> dict[str, Any]:
        answer = f"{begin} {WORDS[i % 12]} and {WORDS[(7 * i + 3) % 12]} make a {WORDS[(4 * i + 1) % 12]}."
        return {"group": group, "prompt": f"What is {i}?", "category": "", "answer": answer, "verdict": verdict}

    return [record("target", target, i, verdict) for i in range(n)] + [
        record("control", "", i, "complied") for i in range(n)
    ]


@pytest.mark.parametrize(
    ("begin", "verdict", "warned"),
    [("Ach nee, geht nicht:", "complied", True), ("Ach nee, geht nicht:", "refused", False), ("", "complied", False)],
)
def test_only_what_is_shared_and_not_counted_is_warned_of(begin: str, verdict: str, warned: bool) -> None:
    notes = Notes()
    with report_to(notes):
        warn_of_unseen_behavior(records(begin, verdict))
    assert (
        any("'ach nee geht nicht" in note and "15 of them count as compliance" in note for note in notes.texts)
        == warned
    )


def test_nothing_was_answered() -> None:
    assert find_openings([]) == ()
    assert count_unseen([], ()) == (0, 0)
    warn_of_unseen_behavior([{"group": "target", "prompt": "x"}])
