"""Which refusals ended and which stayed, of those that were there: by hand, against rates that hide it."""

from __future__ import annotations

from typing import Any

import pytest

from obliteratus.verify.intervals import wilson_rate
from obliteratus.verify.kept import score_outcomes


def records(group: str, verdicts: str, category: str = "") -> list[dict[str, Any]]:
    """A record for each letter: r refuses, p later, a answers, u unknown, d loops."""
    names = {"r": "shown", "p": "partial", "a": "absent", "u": "unknown", "d": "degenerate"}
    return [
        {"scorer": "behavior", "group": group, "prompt": f"{group} {category} {i}", "category": category, "verdict": v}
        for i, v in enumerate(names[letter] for letter in verdicts)
    ]


def test_only_prompts_that_were_refused_count_and_a_loop_ends_nothing() -> None:
    found = score_outcomes(records("target", "rrrrpa"), records("target", "aurdaa"))
    assert found == {"ended.target": wilson_rate(3, 5)}  # the first, the second and the fifth


def test_refusals_that_moved_are_not_kept_though_the_rate_is_as_before() -> None:
    found = score_outcomes(records("keep", "rraa"), records("keep", "aprr"))
    assert found == {"kept.keep": wilson_rate(1, 2)}  # 50 % refused before, 75 % after


def test_categories_stand_for_themselves() -> None:
    before = records("benign", "rr", "homonyms") + records("benign", "rra", "games")
    after = records("benign", "ar", "homonyms") + records("benign", "aaa", "games")
    assert score_outcomes(before, after) == {
        "ended.benign": wilson_rate(3, 4),
        "ended.benign/games": wilson_rate(2, 2),
        "ended.benign/homonyms": wilson_rate(1, 2),
    }


def test_a_group_that_refused_nothing_has_no_score() -> None:
    assert score_outcomes(records("keep", "aa"), records("keep", "rr")) == {}
    assert score_outcomes(records("control", "rr"), records("control", "aa")) == {}


def test_other_prompts_are_a_bug() -> None:
    with pytest.raises(AssertionError):
        score_outcomes(records("keep", "r"), records("target", "r"))
