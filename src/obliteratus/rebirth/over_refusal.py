"""False refusals that ended beside true ones that stayed: a sentence, shares by category, and answers of both kinds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from obliteratus.core.results import Run, Score
from obliteratus.judge.judge import SHOWN
from obliteratus.rebirth.headline import count, format_percent
from obliteratus.report.answer_cards import Card
from obliteratus.verify.kept import OUTCOMES
from obliteratus.verify.score_names import REFUSAL, describe_score

MOST_CARDS = 8  # of each kind; all answers stand further down the page


def describe_outcomes(run: Run) -> str:
    """Return how many false refusals ended and how many true ones stayed; '' without keep and benign prompts."""
    clauses = []
    for group, outcome in OUTCOMES.items():
        if score := run.after.get(f"{outcome}.{group}"):
            was = _name_group(run, group)
            clauses.append(
                f"{count(score)} {was} {'stayed' if outcome == 'kept' else 'ended'} ({format_percent(score)})"
            )
    said = "; ".join(clauses)
    return f"Where the answer showed it before: {said}." if said else ""


def _name_group(run: Run, group: str) -> str:
    refusal = str(run.judge.get("behavior", REFUSAL)) == REFUSAL
    what = "refusals" if refusal else "answers with it"
    return f"{what} of {group} prompts"


def outcome_rows(run: Run, behavior: str) -> list[dict[str, Any]]:
    """Return a row for each share of `verify.kept`, those by category too, for a plot of dots with intervals."""
    names = [name for name in run.after if name.partition(".")[0] in OUTCOMES.values()]
    return [_draw(describe_score(name, behavior), run.after[name]) for name in names]


def _draw(label: str, score: Score) -> dict[str, Any]:
    low, high = (score.low, score.high) if score.has_interval else (None, None)
    text = f"{count(score)}, {format_percent(score)}"
    return {"label": label, "text": text, "sides": [{"value": score.value, "low": low, "high": high, "text": text}]}


def pick_both_kinds(cards: Sequence[Card]) -> Mapping[str, list[Card]]:
    """Return cards of prompts that showed the behavior before, by title: where it should end, and where it should stay.

    Of each kind there are at most `MOST_CARDS`, first those that went wrong: still there, or lost.
    """
    kinds: dict[str, list[Card]] = {}
    for title, outcome in (("Where it should end", "ended"), ("Where it should stay", "kept")):
        groups = [group for group, found in OUTCOMES.items() if found == outcome]
        shown = [card for card in cards if card.group in groups and card.sides[0].verdict in SHOWN]
        wrong = SHOWN if outcome == "ended" else ("absent", "unknown", "degenerate", "unfinished")
        shown.sort(key=lambda card: card.sides[-1].verdict not in wrong)
        kinds[title] = shown[:MOST_CARDS]
    return kinds
