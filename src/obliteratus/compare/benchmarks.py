"""Tasks of lm-evaluation-harness on a model and on its edits, with one load: paired differences, item by item."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obliteratus.compare.page import format_points
from obliteratus.core.results import Score
from obliteratus.core.types import Plan, Subject
from obliteratus.excise.live.hooks import applied
from obliteratus.rebirth.model_card import format_score
from obliteratus.verify.benchmark import name_metric, to_measurement
from obliteratus.verify.score_names import describe_task
from obliteratus.verify.scoring import Measurement

if TYPE_CHECKING:
    from obliteratus.benchmark.run import AskingStyle, TaskResults
    from obliteratus.benchmark.tasks import LoadedTasks

BASE = "base"
CHANGE = ".change"
RESULTS, ITEMS = "bench.json", "items.jsonl"


@dataclass(frozen=True)
class BenchmarkSide:
    """What the tasks gave for the model under one plan, or without any."""

    name: str
    results: TaskResults
    measured: Measurement
    """Scores, and for a plan the change of each against the base."""

    @property
    def scores(self) -> dict[str, Score]:
        """The scores by name, without changes."""
        return {name: score for name, score in self.measured.scores.items() if not name.endswith(CHANGE)}

    @property
    def changes(self) -> dict[str, Score]:
        """The changes by the names of their scores."""
        return {n.removesuffix(CHANGE): s for n, s in self.measured.scores.items() if n.endswith(CHANGE)}


def run_sides(
    subject: Subject, plans: Mapping[str, Plan], tasks: LoadedTasks, style: AskingStyle
) -> list[BenchmarkSide]:
    """Return the sides: the unedited model, then the model under each plan, which is switched on for it alone."""
    from obliteratus.benchmark.run import run_tasks

    results = run_tasks(subject, tasks, style)
    sides = [BenchmarkSide(BASE, results, to_measurement(results))]
    for name, plan in plans.items():
        with applied(subject, plan):
            results = run_tasks(subject, tasks, style)
        sides.append(BenchmarkSide(name, results, to_measurement(results, sides[0].measured)))
    return sides


# ------------------------------------------------------------------------------------------- what is shown
def list_benchmark_rows(sides: Sequence[BenchmarkSide]) -> list[list[str]]:
    """Return a row for each metric and side: what is measured, the side, the score, and the change to the base."""
    rows = []
    for name, base in sides[0].scores.items():
        for side in sides:
            label = "" if side is not sides[0] else f"{describe_task(name)} ({base.n})"
            change = format_change(side.changes[name]) if name in side.changes else ""
            rows.append([label, side.name, format_score(side.scores[name]), change])
    return rows


def format_change(change: Score) -> str:
    """Return a difference in percentage points of shares, a ratio of perplexities, or another difference."""
    if change.unit == "share":
        return format_points(change)
    sign = "× " if change.unit == "ratio" else ""
    return f"{sign}{format_score(change)}"


def describe_benchmarks(sides: Sequence[BenchmarkSide]) -> list[str]:
    """Return a sentence for each plan: which metrics changed beyond chance, and how many items were won and lost."""
    return [_describe_side(side, sides[0]) for side in sides[1:]]


def _describe_side(side: BenchmarkSide, base: BenchmarkSide) -> str:
    changed = [describe_task(name) for name, change in side.changes.items() if is_beyond_chance(change)]
    turned = [f"{describe_task(name)} {won} won, {lost} lost" for name, won, lost in _count_turned(side, base)]
    what = f"changes {' and '.join(changed)} beyond chance" if changed else "changes no score beyond chance"
    return f"{side.name} {'; items: '.join([what, ', and '.join(turned)] if turned else [what])}."


def is_beyond_chance(change: Score) -> bool:
    """Return whether the interval of a change leaves out no change at all: 0, or a ratio of 1."""
    same = 1.0 if change.unit == "ratio" else 0.0
    return change.has_interval and not change.low <= same <= change.high


def _count_turned(side: BenchmarkSide, base: BenchmarkSide) -> Iterator[tuple[str, int, int]]:
    for name, own in side.measured.items.items():
        if own.unit == "share" and name in base.measured.items:
            change = own.values - base.measured.items[name].values
            yield name, int((change > 0).sum()), int((change < 0).sum())


# ------------------------------------------------------------------------------------------- what is written
def to_plain(sides: Sequence[BenchmarkSide], model: str, tasks: LoadedTasks, style: AskingStyle) -> dict[str, Any]:
    """Return everything but the items as plain data for JSON."""
    return {
        "model": model,
        "tasks": {name: {"version": task.VERSION} for name, task in tasks.tasks.items()},
        "chat": style.chat,
        "system": style.system,
        "limit": style.limit,
        "higher_is_better": {name_metric(m): m.higher_is_better for m in sides[0].results.metrics},
        "scores": {side.name: _dump(side.scores) for side in sides},
        "changes": {side.name: _dump(side.changes) for side in sides[1:]},
    }


def _dump(scores: Mapping[str, Score]) -> dict[str, Any]:
    return {name: score.model_dump(mode="json") for name, score in scores.items()}


def write_benchmarks(sides: Sequence[BenchmarkSide], plain: Mapping[str, Any], folder: Path) -> None:
    """Write the results, and a line for each item with what every side made of it."""
    (folder / RESULTS).write_text(json.dumps(plain, indent=1, ensure_ascii=False), encoding="utf-8")
    with (folder / ITEMS).open("w", encoding="utf-8") as file:
        for line in list_items(sides):
            file.write(json.dumps(line, ensure_ascii=False, default=_to_json) + "\n")


def list_items(sides: Sequence[BenchmarkSide]) -> Iterator[dict[str, Any]]:
    """Yield each item: its task, number, filter, prompt and target, and by side its metrics and what it rests on."""
    for task, samples in sides[0].results.samples.items():
        for row, sample in enumerate(samples):
            yield {
                "task": task,
                "item": sample["doc_id"],
                "filter": sample["filter"],
                "prompt": sample["arguments"][0][0],
                "target": sample["target"],
                "sides": {side.name: _describe_item(side.results.samples[task][row]) for side in sides},
            }


def _describe_item(sample: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metrics of an item, and what the model gave: answers, or log-likelihoods with what is greedy."""
    return {name: sample[name] for name in sample["metrics"] if name in sample} | {"given": sample["filtered_resps"]}


def _to_json(value: Any) -> Any:
    """Return numpy's numbers as Python's. Anything else is written as text."""
    return value.item() if hasattr(value, "item") else str(value)
