"""The page of a comparison: what differs, shares by side, and all answers side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from obliteratus.compare.differences import SharesOfSides, describe_comparison
from obliteratus.compare.sides import SideAnswers
from obliteratus.core.results import Score
from obliteratus.rebirth.model_card import format_score
from obliteratus.rebirth.run_page import draw_side
from obliteratus.report.answer_cards import make_cards
from obliteratus.report.hide import hide_private
from obliteratus.report.html import render_page
from obliteratus.verify.score_names import describe_score


def render_comparison(sides: Sequence[SideAnswers], shares: Sequence[SharesOfSides]) -> str:
    """Return the page."""
    behavior, names = sides[0].behavior, [side.name for side in sides]
    columns, rows = tabulate_shares(sides, shares)
    lines = [_merge(sides, key) for key in sides[0].answers]
    ids = {f"s{i}": name for i, name in enumerate(names)}
    return render_page(
        "compare",
        title=" · ".join(names),
        headline=hide_private(describe_comparison(sides, shares)),
        names=names,
        shares=[_dots(s, behavior, names) for s in shares],
        columns=columns,
        rows=rows,
        cards=make_cards(lines, behavior, ids),
        ids=[(name, key) for key, name in ids.items()],
    )


def tabulate_shares(sides: Sequence[SideAnswers], shares: Sequence[SharesOfSides]) -> tuple[list[str], list[list[str]]]:
    """Return columns and rows: the share of each side, and the difference of each later one to the first in points."""
    names = [side.name for side in sides]
    columns = ["answers", *names, *(f"{name} − {names[0]}" for name in names[1:])]
    rows = [
        [describe_score(s.name, sides[0].behavior), *map(format_score, s.rates), *map(format_points, s.changes)]
        for s in shares
    ]
    return columns, rows


def list_shares(sides: Sequence[SideAnswers], shares: Sequence[SharesOfSides]) -> tuple[list[str], list[list[str]]]:
    """Return the same as columns and a row per share and side, for a narrow terminal."""
    rows = []
    for s in shares:
        changes = ["", *map(format_points, s.changes)]
        for i, (side, rate, change) in enumerate(zip(sides, s.rates, changes, strict=True)):
            label = "" if i else describe_score(s.name, sides[0].behavior)
            rows.append([label, side.name, format_score(rate), change])
    return ["answers", "side", "share", f"points to {sides[0].name}"], rows


def format_points(change: Score) -> str:
    """Return a difference of shares in percentage points with its interval."""
    return f"{100 * change.value:+.1f} ({100 * change.low:+.1f} to {100 * change.high:+.1f})".replace("-", "−")


def _dots(shares: SharesOfSides, behavior: str, names: Sequence[str]) -> dict[str, Any]:
    drawn = [draw_side(name, score) for name, score in zip(names, shares.rates, strict=True)]
    text = " · ".join(f"{100 * side['value']:.1f}" for side in drawn) + " %"
    return {"label": describe_score(shares.name, behavior), "sides": drawn, "text": text}


def _merge(sides: Sequence[SideAnswers], key: tuple[str, str]) -> dict[str, Any]:
    line = {"group": key[0], "prompt": key[1], "category": sides[0].categories[key]}
    return line | {f"s{i}": side.answers[key] for i, side in enumerate(sides)}
