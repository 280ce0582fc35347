"""The front of a search or a fit as plain data for a page: its plot, table, history, importances and answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from obliteratus.core.pareto import pareto_front
from obliteratus.core.toml import format_short
from obliteratus.report.answer_cards import Card, make_cards
from obliteratus.report.scatter import LARGE, Plot, Point, make_plot
from obliteratus.verify.answers import read_lines
from obliteratus.verify.intervals import wilson_rate
from obliteratus.verify.score_names import describe_score

SEARCHED, TUNED, ANSWERS = "front.json", "front/front.json", "front/answers.jsonl"
Record = Mapping[str, Any]


def describe_front(folder: Path, behavior: str) -> dict[str, Any]:
    """Return what the template shows of the front in a run's folder; empty for a run without one."""
    if (folder / SEARCHED).is_file():
        return describe_search(folder, behavior)
    return describe_tuned(folder, behavior) if (folder / TUNED).is_file() else {}


def describe_search(folder: Path, behavior: str) -> dict[str, Any]:
    """Return the front of a search, with the history of its trials and its members' answers."""
    record = json.loads((folder / SEARCHED).read_text(encoding="utf-8"))
    names = [key.removeprefix("-") for key in record["minimize"]]
    said = [describe_score(name, behavior) for name in names]
    cards = _read_cards(folder, behavior)
    return {
        "title": f"The front of {record['trials']} trials",
        "about": f"On search prompts. {record['answered']} trials were answered, the others estimated from first "
        "tokens. No trial is better than a member of the front in all that is minimized; the red one was chosen. "
        "A member opens its answers.",
        "plot": plot_front(record, names, said) if len(names) > 1 else plot_history(record, 0, said[0]),
        "columns": ["", "trial", *said, "values"],
        "rows": [_row(number, member, names, record["picked"]) for number, member in enumerate(record["front"], 1)],
        "histories": {
            f"{name}, trial by trial, with the best so far as a line": plot_history(record, i, name)
            for i, name in enumerate(said)
        },
        "importances": {
            describe_score(name.removeprefix("-"), behavior): [
                (path, share, f"{100 * share:.0f} %") for path, share in shares.items()
            ]
            for name, shares in record.get("importances", {}).items()
        },
        "cards": cards,
        "names": list(dict.fromkeys((side.name, side.id) for card in cards for side in card.sides)),
    }


def describe_tuned(folder: Path, behavior: str) -> dict[str, Any]:
    """Return the plans of a fit from gentle to thorough."""
    members = json.loads((folder / TUNED).read_text(encoding="utf-8"))
    keeps = all("kept" in m for m in members)
    columns = {"rate": describe_score(f"{behavior}.target", behavior)}
    columns |= {"kept": describe_score("kept.keep", behavior)} if keeps else {}
    heights = "kept" if keeps else "kl"
    points = [
        Point(m["rate"], m[heights], "front", f"plan {m['number']}: {m['rate']:.1%}, {_say_costs(m)}", r=LARGE)
        for m in members
    ]
    rows = [
        [m["number"], *(f"{m[c]:.1%}" for c in columns), f"{m['kl']:.4f}", f"{m['scale']:.2f}", m["edits"]]
        for m in members
    ]
    y_name = columns.get("kept", "KL (nats)")
    return {
        "title": "Plans from gentle to thorough",
        "about": "On search prompts. Each is kept in front/N, and `obliteratus apply` takes any of them.",
        "plot": make_plot(points, (columns["rate"], y_name), "plans of the fit", points, True),
        "columns": ["plan", *columns.values(), "KL", "scale", "edits"],
        "rows": [list(map(str, row)) for row in rows],
        "histories": {},
        "importances": {},
        "cards": [],
        "names": [],
    }


def _say_costs(member: Record) -> str:
    return f"KL {member['kl']:.4f}" + (f", kept {member['kept']:.1%}" if "kept" in member else "")


# ------------------------------------------------------------------------------------------ plots
def plot_front(record: Record, names: Sequence[str], said: Sequence[str]) -> Plot:
    """Return the first two objectives of all trials, the unedited model and the front with its intervals."""
    signs = find_signs(record)
    points = [
        _trial_point(t, *(s * v for s, v in zip(signs, t["objectives"][:2], strict=False))) for t in record["all"]
    ]
    base = record.get("base", {})
    if all(name in base for name in names[:2]):
        points.append(Point(base[names[0]], base[names[1]], "base", "the unedited model", r=LARGE))
    front = [_member_point(number, member, names, record) for number, member in enumerate(record["front"], 1)]
    # With a third objective some members are on the front for that alone: the line leaves them out.
    line = [front[i] for i in pareto_front([(signs[0] * p.x, signs[1] * p.y) for p in front])]
    return make_plot([*points, *front], (said[0], said[1]), "trials and front", line, percent=True)


def find_signs(record: Record) -> list[int]:
    """Return −1 for each objective that is maximized, whose value trials hold negated, and else 1."""
    return [-1 if name.startswith("-") else 1 for name in record["minimize"]]


def plot_history(record: Record, index: int, name: str) -> Plot:
    """Return one objective trial by trial, with a line through the best so far."""
    sign = find_signs(record)[index]
    points = [_trial_point(t, float(t["number"]), sign * t["objectives"][index]) for t in record["all"]]
    best = accumulate((p.y for p in points), min if sign > 0 else max)
    line = [Point(p.x, y, "front", "") for p, y in zip(points, best, strict=True)]
    return make_plot(points, ("trial", name), f"{name}, trial by trial", line)


def _trial_point(trial: Record, x: float, y: float) -> Point:
    answered = bool(trial["answered"])
    text = f"trial {trial['number']}" + ("" if answered else ", estimated")
    return Point(x, y, "answered" if answered else "trial", text)


def _member_point(number: int, member: Record, names: Sequence[str], record: Record) -> Point:
    x, y = (member["scores"][name] for name in names[:2])
    n = record.get("prompts", 0)
    score = wilson_rate(round(x * n), n) if n and 0 <= x <= 1 else None
    low, high = (score.low, score.high) if score is not None and score.has_interval else (None, None)
    text = f"member {number}, trial {member['trial']}: {x:.1%}, {y:.4f}"
    return Point(x, y, "chosen" if number == record["picked"] else "front", text, f"#side-{number}", low, high, LARGE)


# ------------------------------------------------------------------------------------------ tables and answers
def _row(number: int, member: Record, names: Sequence[str], picked: int) -> list[str]:
    scores = [f"{member['scores'][name]:.3f}" for name in names]
    values = ", ".join(f"{path}={format_short(value)}" for path, value in member["values"].items())
    return [f"{'→ ' if number == picked else ''}{number}", str(member["trial"]), *scores, values]


def _read_cards(folder: Path, behavior: str) -> list[Card]:
    lines = read_lines(folder / ANSWERS)
    keys = [key for key in (lines[0] if lines else {}) if key == "before" or key.isdigit()]
    return make_cards(lines, behavior, {key: "before" if key == "before" else f"member {key}" for key in keys})
