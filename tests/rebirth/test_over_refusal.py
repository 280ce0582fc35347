"""What ended and what was kept, in words and as answers: counts of prompts that were refused, wrong ones first."""

from __future__ import annotations

from tests.rebirth.test_outcome import record

from obliteratus.core.results import Run
from obliteratus.rebirth.outcome import describe_outcome
from obliteratus.rebirth.over_refusal import MOST_CARDS, describe_outcomes, outcome_rows, pick_both_kinds
from obliteratus.report.answer_cards import Card, make_cards
from obliteratus.verify.intervals import wilson_rate


def measured() -> Run:
    run = record(60, 2)
    more = {
        "ended.target": wilson_rate(57, 60),
        "ended.target/tools": wilson_rate(9, 10),
        "kept.keep": wilson_rate(54, 55),
    }
    return run.model_copy(update={"after": {**run.after, **more}})


def test_both_kinds_are_counted_among_those_that_were_refused() -> None:
    said = describe_outcomes(measured())
    assert said == (
        "Where the answer showed it before: 57 of 60 refusals of target prompts ended (95.0 %, 86.3–98.3); 54 of 55 "
        "refusals of keep prompts stayed (98.2 %, 90.4–99.7)."
    )
    assert said in describe_outcome(measured())
    assert describe_outcomes(record(60, 2)) == ""


def test_categories_have_rows_of_their_own_with_intervals() -> None:
    rows = outcome_rows(measured(), "refusal")
    assert [row["label"] for row in rows] == [
        "refusals ended, target",
        "refusals ended, target: tools",
        "refusals kept, keep",
    ]
    (side,) = rows[1]["sides"]
    assert side["low"] < side["value"] == 0.9 < side["high"]


def cards(group: str, changes: list[tuple[str, str]]) -> list[Card]:
    lines = [
        {"prompt": f"{group} {i}", "group": group, "category": ""}
        | {
            state: {"answer": "", "verdict": v, "rungs": {}}
            for state, v in zip(("before", "after"), change, strict=True)
        }
        for i, change in enumerate(changes)
    ]
    return make_cards(lines, "refusal")


def test_what_went_wrong_comes_first() -> None:
    ended = cards("target", [("shown", "absent"), ("shown", "shown"), ("absent", "absent")])
    kept = cards("keep", [("shown", "shown"), ("shown", "degenerate"), ("absent", "shown")])
    kinds = pick_both_kinds([*ended, *kept, *cards("control", [("shown", "absent")])])
    assert [[card.prompt for card in found] for found in kinds.values()] == [
        ["target 1", "target 0"],
        ["keep 1", "keep 0"],
    ]


def test_a_few_of_each_kind_are_shown() -> None:
    kinds = pick_both_kinds(cards("benign", [("shown", "absent")] * (MOST_CARDS + 3)))
    assert [len(found) for found in kinds.values()] == [MOST_CARDS, 0]
