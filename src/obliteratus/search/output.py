"""What a search leaves: its front as a table, a picture, and recipe files that `run` takes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from obliteratus.core.run_folder import write_atomic
from obliteratus.pipeline.recipe import dump_toml
from obliteratus.search.run import Member, SearchResult
from obliteratus.search.trials import Trial

# Colours that colour-blind readers tell apart (Okabe and Ito): trials with answers, estimates, the front.
ANSWERED, ESTIMATED, FRONT = "#0072B2", "#BBBBBB", "#D55E00"


JOURNAL = "study.journal"


def write_front(found: SearchResult, folder: Path, journal: Path) -> None:
    """``front/N.toml`` for each member, ``front.json`` with all trials, and ``front.png``, into an existing folder.

    journal: the study's own file; kept too if there is one, so that a later search can go on from it.
    """
    (folder / "front").mkdir()
    for number, member in enumerate(found.front, 1):
        write_atomic(folder / "front" / f"{number}.toml", annotate_member(member))
    search = {**found.run.search, "all": [asdict(trial) for trial in found.trials]}
    write_atomic(folder / "front.json", json.dumps(search, indent=1))
    plot_front(found, folder / "front.png")
    if journal.is_file():
        shutil.copy(journal, folder / JOURNAL)


def annotate_member(member: Member) -> str:
    """The member's recipe, behind what its check found."""
    scores = ", ".join(f"{name} {value:.4g}" for name, value in flat_scores(member).items())
    return f"# Trial {member.trial.number} of a search; on search prompts: {scores}\n" + dump_toml(member.recipe)


def flat_scores(member: Member) -> dict[str, float]:
    """The scores of a member by name, those by category left out."""
    return {name: value for name, value in member.scores.items() if "/" not in name}


def front_rows(found: SearchResult) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the table of the front; the chosen member is marked."""
    names = [name.removeprefix("-") for name in found.run.search["minimise"]]
    columns = ["", "trial", *names, "values"]
    return columns, [_row(i, m, names, i == found.picked) for i, m in enumerate(found.front)]


def _row(i: int, member: Member, names: Sequence[str], chosen: bool) -> list[str]:
    scores = [f"{member.scores[name]:.3f}" for name in names]
    values = ", ".join(f"{path}={_short(value)}" for path, value in member.trial.values.items())
    return [f"{'→' if chosen else ''}{i + 1}", str(member.trial.number), *scores, values]


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else json.dumps(value) if isinstance(value, list) else str(value)


def plot_front(found: SearchResult, file: Path) -> None:
    """All trials over the first two objectives, and the checked front; a single objective over its trials."""
    from matplotlib.figure import Figure  # takes half a second to load, and no other command draws

    names = [*found.run.search["minimise"], "trial"]
    figure = Figure(figsize=(6, 4), dpi=150, layout="constrained")  # inches; a column of a paper is about as wide
    axes = figure.add_subplot(xlabel=names[0], ylabel=names[1], title=found.run.search["study"])
    for answered, colour in ((False, ESTIMATED), (True, ANSWERED)):
        points = [_point(t) for t in found.trials if t.answered == answered]
        label = "answers" if answered else "estimated from first tokens"
        axes.scatter([x for x, _ in points], [y for _, y in points], s=12, color=colour, label=label)
    line = [(*m.objectives, float(m.trial.number))[:2] for m in found.front]
    axes.plot([x for x, _ in line], [y for _, y in line], "o-", color=FRONT, label="front, checked")
    axes.plot(*line[found.picked], "o", ms=11, mfc="none", color=FRONT, label="chosen")
    axes.legend()
    figure.savefig(file)


def _point(trial: Trial) -> tuple[float, float]:
    x, y = (*trial.objectives, float(trial.number))[:2]
    return x, y
