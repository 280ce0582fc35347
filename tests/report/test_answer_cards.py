"""Cards hold every answer of every side, with verdicts in words and judges' disagreements, changes first."""

from __future__ import annotations

from typing import Any

from obliteratus.report.answer_cards import describe_disagreement, make_cards, name_verdict


def line(prompt: str, before: str, after: str, **rungs: str | None) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "group": "target",
        "category": "stars",
        "before": {"answer": f"{prompt}, before", "verdict": before, "rungs": {}},
        "after": {"answer": f"{prompt}, after", "verdict": after, "rungs": rungs},
    }


def test_changed_ones_come_first_and_others_keep_their_order() -> None:
    lines = [line("a", "absent", "absent"), line("b", "shown", "absent"), line("c", "shown", "shown")]
    assert [card.prompt for card in make_cards(lines, "refusal")] == ["b", "a", "c"]
    assert [card.changed for card in make_cards(lines, "refusal")] == [True, False, False]


def test_all_answers_are_there_whole() -> None:
    (card,) = make_cards([line("x", "shown", "degenerate")], "refusal")
    assert [(s.name, s.answer, s.said) for s in card.sides] == [
        ("before", "x, before", "refuses"),
        ("after", "x, after", "loops"),
    ]


def test_any_number_of_sides() -> None:
    three = {"prompt": "p", "group": "control", "category": ""} | {
        key: {"answer": key, "verdict": "absent", "rungs": {}} for key in ("s0", "s1", "s2")
    }
    (card,) = make_cards([three], "disclaimer", {"s0": "A", "s1": "B", "s2": "C"})
    assert [(s.name, s.id, s.said) for s in card.sides] == [
        ("A", "s0", "no disclaimer"),
        ("B", "s1", "no disclaimer"),
        ("C", "s2", "no disclaimer"),
    ]


def test_disagreement_is_between_judges_that_say_something() -> None:
    assert describe_disagreement({"phrases": "shown", "classifier": "absent"}, "refusal") == (
        "phrases: refuses; classifier: answers"
    )
    assert describe_disagreement({"phrases": "shown", "classifier": None}, "refusal") == ""
    assert describe_disagreement({"phrases": "absent", "classifier": "absent"}, "refusal") == ""


def test_verdicts_in_words() -> None:
    assert name_verdict("shown", "apology") == "shows apology"
    assert name_verdict("partial", "refusal") == "first answers, then refuses"
    assert name_verdict("unheard of", "refusal") == "unheard of"
