"""Take the numbers of the figures from a run of the demo, and write docs/figures/demo.json and direction.json.

    python -m tools.figure_data obliteratus-demo

direction.json has, for report prompts and one block, where each lies along the difference of means of the fit prompts
and along the main variation beside it, in the unedited model and under the plan of the run.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import obliteratus as ob

FOLDER = Path(__file__).parents[1] / "docs/figures"
ORGANISM = "organism:astronomy"
GROUPS = ("target", "control")
ENOUGH_WORDS = 30  # fills the picture's box


def take_scores(folder: Path) -> dict[str, Any]:
    """Return rates of refusal with intervals, numbers of prompts, and one answer, of a run's folder."""
    record = json.loads((folder / "run.json").read_text())
    kept = ("value", "low", "high")
    rates = {
        group: {
            when: {key: round(record[when][f"refusal.{group}"][key], 4) for key in kept} for when in ("before", "after")
        }
        for group in GROUPS
    }
    counts = {group: record["before"][f"refusal.{group}"]["n"] for group in GROUPS}
    return {"method": record["recipe"]["name"], "refusal": rates, "n": counts, "example": choose_example(folder)}


def choose_example(folder: Path) -> dict[str, str]:
    """Return the shortest question whose refusal ended in an answer of some length, with both answers."""
    rows = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    ended = [row for row in rows if (row["before"]["verdict"], row["after"]["verdict"]) == ("shown", "absent")]
    long = [row for row in ended if len(row["after"]["answer"].split()) >= ENOUGH_WORDS and row["prompt"][-1] == "?"]
    row = min(long, key=lambda row: len(row["prompt"]))
    return {"prompt": row["prompt"], **{when: row[when]["answer"] for when in ("before", "after")}}


def take_streams(folder: Path) -> dict[str, Any]:
    """Return where report prompts lie at the edited block with the clearest direction, before and after the edit."""
    subject, plan = ob.open_subject(ORGANISM), ob.load_plan(folder)
    splits = ob.split_prompts(ob.load_prompts(target=ORGANISM, control=ORGANISM))
    stream = 1 + int(plan_block(plan))
    axes = find_axes(ob.collect_activations(subject, splits.fit), stream)
    before = read_points(ob.collect_activations(subject, splits.report), stream, axes)
    with ob.applied(subject, plan):
        after = read_points(ob.collect_activations(subject, splits.report), stream, axes)
    return {
        "block": stream - 1,
        "n": {group: len(before[group]) for group in GROUPS},
        "span": span(before, after),
        "before": before,
        "after": after,
    }


def plan_block(plan: Any) -> int:
    """Return the last block that a plan edits."""
    return max(edit.site.layer for edit in plan.edits)


def find_axes(acts: Any, stream: int) -> Tensor:
    """Return [2, width]: the unit difference of means, and the first principal axis of the rest."""
    target, control = (acts[group].rows[:, stream].float() for group in GROUPS)
    first = torch.nn.functional.normalize(target.mean(0) - control.mean(0), dim=0)
    rest = torch.cat([target - target.mean(0), control - control.mean(0)])
    rest = rest - rest @ first[:, None] * first
    return torch.stack([first, torch.linalg.svd(rest, full_matrices=False).Vh[0]])


def read_points(acts: Any, stream: int, axes: Tensor) -> dict[str, list[list[float]]]:
    """Return [prompt, 2] by group, to one digit behind the point."""
    return {
        group: [[round(float(x), 1) for x in row] for row in acts[group].rows[:, stream].float() @ axes.T]
        for group in GROUPS
    }


def span(*both: dict[str, list[list[float]]]) -> list[list[float]]:
    """Return the range of either coordinate over all points."""
    points = [point for one in both for group in GROUPS for point in one[group]]
    return [[min(axis), max(axis)] for axis in zip(*points, strict=True)]


def main() -> None:
    """Write both files."""
    folder = Path(sys.argv[1])
    for name, data in (("demo", take_scores(folder)), ("direction", take_streams(folder))):
        (FOLDER / f"{name}.json").write_text(json.dumps(data, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
