"""What a search writes: its front as a table, a plot, and recipe files for `run`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from obliteratus.core.run_folder import write_atomic
from obliteratus.core.toml import dump_toml, format_short
from obliteratus.search.run import FrontMember, SearchResult
from obliteratus.search.trials import Trial
from obliteratus.verify.answers import FILE as ANSWERS
from obliteratus.verify.answers import write_states
from obliteratus.verify.score_names import describe_score

# Colors that color-blind readers can tell apart (Okabe and Ito).
ANSWERED, ESTIMATED, FRONT = "#0072B2", "#BBBBBB", "#D55E00"
JOURNAL = "study.journal"
# Scores that the front lists beside the objectives: whether answers are words at all, and hold together.
FLUENCY = ("degenerate.target", "degenerate.control", "fluency.ratio")


def write_front(result: SearchResult, folder: Path, journal: Path) -> None:
    """Write ``front/N.toml`` for each member, their answers, ``front.json`` with all trials, and ``front.png``.

    journal: the study's file. If it exists it is copied too, so that a later search can continue from it.
    """
    (folder / "front").mkdir()
    for number, member in enumerate(result.front, 1):
        write_atomic(folder / "front" / f"{number}.toml", annotate_member(member))
    states = {"before": result.unedited.records} | {str(n): m.records for n, m in enumerate(result.front, 1)}
    write_states(states, folder / "front" / ANSWERS)
    record = {**result.run.search, "all": [asdict(trial) for trial in result.trials]}
    write_atomic(folder / "front.json", json.dumps(record, indent=1))
    plot_front(result, folder / "front.png")
    if journal.is_file():
        shutil.copy(journal, folder / JOURNAL)


def annotate_member(member: FrontMember) -> str:
    """Return the member's recipe as TOML, after a comment with the scores of its check."""
    scores = ", ".join(f"{name} {value:.4g}" for name, value in flat_scores(member).items())
    return f"# Trial {member.trial.number} of a search; on search prompts: {scores}\n" + dump_toml(member.recipe)


def flat_scores(member: FrontMember) -> dict[str, float]:
    """Return the member's scores without those by category."""
    return {name: value for name, value in member.scores.items() if "/" not in name}


def front_rows(result: SearchResult) -> tuple[list[str], list[list[str]]]:
    """Return the columns and rows of the front's table. An arrow marks the chosen member."""
    objectives = [name.removeprefix("-") for name in result.run.search["minimize"]]
    fluency = [n for n in FLUENCY if n not in objectives and all(n in m.scores for m in result.front)]
    names = [*objectives, *fluency]
    headings = [describe_score(name, str(result.run.judge["behavior"])) for name in names]
    rows = [_row(i, m, names, i == result.picked) for i, m in enumerate(result.front)]
    return ["", "trial", *headings, "values"], rows


def _row(i: int, member: FrontMember, names: Sequence[str], chosen: bool) -> list[str]:
    scores = [f"{member.scores[name]:.3f}" for name in names]
    values = ", ".join(f"{path}={format_short(value)}" for path, value in member.trial.values.items())
    return [f"{i + 1}{' ←' if chosen else ''}", str(member.trial.number), *scores, values]


def plot_front(result: SearchResult, file: Path) -> None:
    """Write the front as an image."""
    from matplotlib.figure import Figure  # imported here because it takes half a second to load

    figure = Figure(figsize=(6, 4), dpi=150, layout="constrained")  # inches: about the width of a column of a paper
    draw_front(result, figure)
    figure.savefig(file)


def draw_front(result: SearchResult, figure: Any) -> None:
    """Draw all trials and the checked front over the first two objectives; a single objective over trial numbers."""
    names = [*result.run.search["minimize"], "trial"][:2]
    signs = [-1 if name.startswith("-") else 1 for name in names]
    x_name, y_name = (name.removeprefix("-") for name in names)
    axes = figure.add_subplot(xlabel=x_name, ylabel=y_name, title=result.run.search["study"])
    for answered, color in ((False, ESTIMATED), (True, ANSWERED)):
        drawn = [_point(t) for t in result.trials if t.answered == answered]
        points = [(signs[0] * x, signs[1] * y) for x, y in drawn]
        label = "answers" if answered else "estimated from first tokens"
        axes.scatter([x for x, _ in points], [y for _, y in points], s=12, color=color, label=label)
    line = [(signs[0] * x, signs[1] * y) for x, y, *_ in ((*m.objectives, m.trial.number) for m in result.front)]
    axes.plot([x for x, _ in line], [y for _, y in line], "o-", color=FRONT, label="front, checked")
    axes.plot(*line[result.picked], "o", ms=11, mfc="none", color=FRONT, label="chosen")
    axes.legend()


def _point(trial: Trial) -> tuple[float, float]:
    x, y = (*trial.objectives, float(trial.number))[:2]
    return x, y
