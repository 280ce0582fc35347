"""Draw docs/figures/*.svg: diagrams of the concepts, the numbers of a demo run, and the packages' imports.

    python -m tools.figures

Runs are read from docs/figures/demo.json and direction.json, which `python -m tools.figure_data` makes from a run.
tests/docs/test_figures.py fails if a figure is out of date.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tools.draw_architecture import draw_architecture
from tools.svg import BLUE, GRAY, INK, LINE, PALE, RED, Drawing

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs/figures"


def _read(name: str) -> Any:
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


# --------------------------------------------------------------------------------------------- a run
def draw_demo() -> Drawing:
    """Draw refusals before and after the demo's edit with their intervals, and one answer before and after."""
    run = _read("demo.json")
    one = Drawing(720, 356, "The demo: refusals before and after, and one answer")
    one.text(24, 34, "What the demo's edit does to refusals", size=17, bold=True)
    for row, (group, name) in enumerate((("target", "topic"), ("control", "others"))):
        _draw_share(one, 70 + 62 * row, f"{name}, {run['n'][group]} prompts", run["refusal"][group])
    _draw_scale(one, 70, 184)
    _draw_answers(one, 222, run["example"])
    return one


LEFT, RIGHT = 190, 690  # where 0 and 100 % stand


def _draw_share(one: Drawing, y: float, name: str, scores: Mapping[str, Any]) -> None:
    one.text(24, y + 12, name)
    for shift, (when, ink) in enumerate((("before", GRAY), ("after", BLUE))):
        score, at = scores[when], y + 22 * shift
        x, low, high = (LEFT + (RIGHT - LEFT) * score[key] for key in ("value", "low", "high"))
        one.line(low, at + 8, high, at + 8, ink=ink, width=3)
        one.dot(x, at + 8, ink, r=6)
        words = f"{when} {100 * score['value']:.1f} %"
        one.text(
            *((low - 10, at + 13) if x > 500 else (high + 10, at + 13)),
            words,
            fill=ink,
            at="end" if x > 500 else "start",
            size=13,
        )


def _draw_scale(one: Drawing, top: float, bottom: float) -> None:
    for percent in (0, 50, 100):
        x = LEFT + (RIGHT - LEFT) * percent / 100
        one.line(x, top - 6, x, bottom, ink="#dde3e9", width=1)
        one.text(x, bottom + 16, f"{percent} %", size=12, fill=GRAY, at="middle")


def _draw_answers(one: Drawing, y: float, example: Mapping[str, str]) -> None:
    one.text(24, y + 6, f"“{example['prompt']}”", bold=True)
    for x, when, ink in ((24, "before", GRAY), (370, "after", BLUE)):
        one.box(x, y + 20, 326, 100, fill="#ffffff", line=ink)
        one.text(x + 12, y + 40, when, size=12, fill=ink, bold=True)
        lines = textwrap.wrap(example[when], 47)
        lines = [*lines[:3], f"{lines[3]} …"] if len(lines) > 4 else lines
        for row, line in enumerate(lines):
            one.text(x + 12, y + 59 + 17 * row, line, size=13)


def draw_direction() -> Drawing:
    """Draw prompts of the organism at one layer: along the direction, and along their main other variation."""
    data = _read("direction.json")
    one = Drawing(720, 380, "Prompts along the direction, before and after removal")
    for x, when, title in ((24, "before", "unedited"), (376, "after", "under the demo's edit")):
        one.box(x, 50, 320, 270, fill="#ffffff")
        one.text(x + 8, 40, title, bold=True)
        _draw_points(one, x, data[when], data["span"])
        one.text(x + 160, 340, "along the difference of means", size=12, fill=GRAY, at="middle")
    one.dot(30, 362, RED)
    one.text(42, 367, f"{data['n']['target']} topic prompts", size=13)
    one.dot(200, 362, BLUE)
    one.text(212, 367, f"{data['n']['control']} other prompts", size=13)
    one.text(696, 367, f"what leaves block {data['block']}, last token", size=12, fill=GRAY, at="end")
    return one


def _draw_points(one: Drawing, x: float, points: Mapping[str, Any], span: list[list[float]]) -> None:
    (left, right), (low, high) = span
    for group, ink in (("control", BLUE), ("target", RED)):
        for across, up in points[group]:
            one.dot(
                x + 12 + 296 * (across - left) / (right - left),
                308 - 246 * (up - low) / (high - low),
                ink,
                r=3.5,
                opacity=0.55,
            )


# --------------------------------------------------------------------------------------------- concepts
def draw_stages() -> Drawing:
    """Draw the six stages and what passes from one to the next."""
    one = Drawing(720, 210, "The six stages of a run")
    stages = (
        ("SUMMON", "model → sites"),
        ("PROBE", "prompts → activations"),
        ("DISTILL", "→ directions"),
        ("EXCISE", "→ plan of edits"),
        ("VERIFY", "→ scores, answers"),
        ("REBIRTH", "→ files, reloaded"),
    )
    for index, (name, note) in enumerate(stages):
        x, y = 20 + 234 * (index % 3), 24 + 92 * (index // 3)
        one.label(x, y, 212, 58, name, note)
        if index % 3 < 2:
            one.line(x + 212, y + 29, x + 233, y + 29, ink=GRAY, arrow=True)
    one.line(594, 82, 594, 99, ink=GRAY)
    one.line(594, 99, 126, 99, ink=GRAY)
    one.line(126, 99, 126, 115, ink=GRAY, arrow=True)
    one.text(
        20,
        198,
        "VERIFY also runs before the edit, and passes repeat PROBE to EXCISE while the behavior is left.",
        size=13,
        fill=GRAY,
    )
    return one


def draw_splits() -> Drawing:
    """Draw the three parts of the prompts and what each is for."""
    one = Drawing(720, 190, "Three parts of the prompts that share nothing")
    parts = (
        ("fit", 0.6, "directions are found here"),
        ("search", 0.15, "choices"),
        ("report", 0.25, "every reported number"),
    )
    x = 20.0
    for name, share, note in parts:
        one.box(x, 56, 680 * share - 6, 62, fill=PALE if name != "report" else "#dceaf7")
        one.text(x + 340 * share - 3, 82, name, at="middle", bold=True)
        one.text(x + 340 * share - 3, 102, f"{share:.0%}", size=12, fill=GRAY, at="middle")
        one.text(x + 340 * share - 3, 140, note, size=12, fill=GRAY, at="middle")
        x += 680 * share
    one.text(20, 36, "Your prompts, target and control alike", bold=True)
    one.text(20, 172, "Prompts that share much wording stay in one part.", size=13, fill=GRAY)
    return one


def draw_sites() -> Drawing:
    """Draw where a block reads from the residual stream and where it writes into it."""
    one = Drawing(720, 300, "Sites of a transformer block: readers and writers")
    one.line(40, 250, 690, 250, ink=INK, width=4, arrow=False)
    one.text(40, 278, "residual stream, one vector per token", size=13, fill=GRAY)
    for x, name in ((130, "attention"), (420, "MLP or experts")):
        one.box(x - 10, 56, 250, 140, fill="#ffffff")
        one.text(x + 115, 80, name, at="middle", bold=True)
        one.label(x, 100, 106, 66, "reader", "attn.in" if x < 200 else "mlp.in")
        one.label(x + 124, 100, 106, 66, "writer", "attn.out" if x < 200 else "mlp.out", fill="#fbe4dd")
        one.line(x + 53, 250, x + 53, 168, ink=GRAY, arrow=True)
        one.text(x + 61, 222, "norm", size=12, fill=GRAY)
        one.line(x + 106, 133, x + 123, 133, ink=GRAY, arrow=True)
        one.line(x + 177, 166, x + 177, 246, ink=RED, width=2.5, arrow=True)
    one.text(24, 34, "Edits act on writers by default: what they add to the stream loses the direction.", size=14)
    return one


def draw_strength() -> Drawing:
    """Draw what is left of a vector along the direction for several strengths."""
    one = Drawing(720, 236, "What one number, the strength, does")
    cases = ((-1.0, "adds"), (0.0, "does nothing"), (0.7, "removes partly"), (1.0, "removes"), (2.0, "reflects"))
    for index, (strength, what) in enumerate(cases):
        x, y = 84 + 138 * index, 124
        one.line(x, y - 84, x, y + 56, ink=LINE, width=1)
        left = 1 - strength
        one.line(x, y, x + 40, y, ink=BLUE, width=3, arrow=True)
        if abs(left) > 0:
            one.line(x, y, x, y - 38 * left, ink=RED, width=3, arrow=True)
        one.text(x, 206, f"strength {strength:g}".replace("-", "−"), at="middle", bold=True, size=13)
        one.text(x, 223, what, at="middle", size=12, fill=GRAY)
    one.text(20, 30, "y ← y − s·QQᵀy", bold=True)
    one.text(190, 30, "red: the part along the direction", fill=RED, size=13)
    one.text(440, 30, "blue: everything else, which stays", fill=BLUE, size=13)
    return one


FIGURES: Mapping[str, Callable[[], Drawing]] = {
    "demo": draw_demo,
    "direction": draw_direction,
    "stages": draw_stages,
    "splits": draw_splits,
    "sites": draw_sites,
    "strength": draw_strength,
    "architecture": lambda: draw_architecture(ROOT / "src"),
}


def main() -> None:
    """Write all figures."""
    for name, draw in FIGURES.items():
        draw().save(FOLDER / f"{name}.svg")


if __name__ == "__main__":
    main()
