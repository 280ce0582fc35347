"""`obliteratus bench` on a model and its edit with one load, over two plain `lm_eval` runs: on the base, on the edit.

The edit is a plan of `basic` on the astronomy organism. Theirs runs on two folders, the base and the merged edit, with
`--model hf` and the same tasks and settings. Every contestant is a process of its own, timed from start to end, in
turns. seconds: on the wall. cpu: of the processor, which others on the machine do not lengthen; the ratios are of both.
equal: metrics of both states that are the same numbers as theirs, and the largest difference.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from bench.common import SMOKE_PROMPTS, describe_machine, load_organism, make_parser, print_report, say, take_prompts
from obliteratus.benchmark.questions import TASKS, list_shipped_tasks
from obliteratus.core.types import Plan, PromptSet, Subject
from obliteratus.distill.steps import find_directions
from obliteratus.excise.needs import wanted_by
from obliteratus.excise.plan import plan_edits, save_plan
from obliteratus.pipeline.recipe import load_recipe
from obliteratus.probe.probe import collect_activations
from obliteratus.prompts import split_prompts
from obliteratus.rebirth.save import WRITERS
from obliteratus.weigh.steps import weigh_sites

FIT_PROMPTS = 32  # of each group: the plan is to be a real one, not the best one
QUICK_LIMIT, SMOKE_LIMIT = 12, 2  # items of each task
BATCH = 8  # of theirs, whose default of 1 is slower
STATES = ("base", "edited")


@dataclass(frozen=True)
class Spent:
    """What a process took, and the accuracies that it printed or wrote."""

    seconds: float
    cpu: float
    values: Mapping[str, float]
    """By ``STATE TASK METRIC``."""


def make_plan(subject: Subject, prompts: PromptSet) -> Plan:
    """Return the plan that `basic` makes of these prompts."""
    recipe = load_recipe("basic")
    acts = collect_activations(subject, prompts, recipe.probe, wanted_by(recipe.excise, subject.sites))
    directions = find_directions(acts, recipe.distill)
    weights = weigh_sites(directions, subject.sites, acts, recipe.weigh)
    return plan_edits(subject, directions, weights, acts, recipe.excise)


def prepare(folder: Path, most: int) -> None:
    """Write the base, the plan and the merged edit, unless an earlier call has."""
    if (folder / "ready").is_file():
        return
    subject, everything = load_organism()
    plan = make_plan(subject, take_prompts(split_prompts(everything, 0).fit, most))
    save_plan(plan, folder / "plan")
    (folder / "edited").mkdir(parents=True, exist_ok=True)
    WRITERS["merged"](subject, plan, folder / "edited")
    subject.model.save_pretrained(folder / "base")
    for state in STATES:
        subject.tokenizer.save_pretrained(folder / state)
    (folder / "ready").touch()


def run_process(command: Sequence[str]) -> tuple[float, float, str]:
    """Return the seconds and the processor's seconds of a process, and what it printed."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}, check=False
    )
    after, seconds = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-2000:]}")
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout


def run_ours(folder: Path, limit: int, chat: bool) -> Spent:
    """Run both states in one process of ours."""
    command = [sys.executable, "-m", "obliteratus", "bench", str(folder / "base"), "--plan", str(folder / "plan")]
    command += ["--tasks", ",".join(list_shipped_tasks()), "--json", "--quiet", *(["--chat"] if chat else [])]
    seconds, cpu, printed = run_process(command + (["--limit", str(limit)] if limit else []))
    scores = json.loads(printed)["scores"]
    sides = zip(STATES, ("base", "plan"), strict=True)
    values = {
        f"{state} {name.removeprefix('benchmark.').replace('.', ' ')}": score["value"]
        for state, side in sides
        for name, score in scores[side].items()
    }
    return Spent(seconds, cpu, values)


def run_theirs(folder: Path, limit: int, chat: bool) -> Spent:
    """Run the two states one after the other, each in a process of theirs."""
    seconds, cpu, values = 0.0, 0.0, dict[str, float]()
    for state in STATES:
        with TemporaryDirectory() as out:
            more = run_process(_their_command(folder / state, limit, chat, out))
            (file,) = Path(out).rglob("results*.json")
            found = json.loads(file.read_text(encoding="utf-8"))["results"]
        seconds, cpu = seconds + more[0], cpu + more[1]
        values |= {f"{state} {name}": value for name, value in _read_values(found)}
    return Spent(seconds, cpu, values)


def _their_command(model: Path, limit: int, chat: bool, out: str) -> list[str]:
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={model},dtype=float32"]
    command += ["--tasks", ",".join(list_shipped_tasks()), "--include_path", str(TASKS), "--device", "cpu"]
    command += ["--batch_size", str(BATCH), "--output_path", out]
    return command + (["--limit", str(limit)] if limit else []) + (["--apply_chat_template"] if chat else [])


def _read_values(found: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, float]]:
    for task, metrics in found.items():
        for key, value in metrics.items():
            name, _, kind = key.partition(",")
            if kind == "none" and not name.endswith("_stderr"):
                yield f"{task} {name}", float(value)


def compare(ours: Sequence[Spent], theirs: Sequence[Spent]) -> dict[str, Any]:
    """Return medians over the pairs, their ratios, and whether all values are equal."""
    shared = {name: abs(value - theirs[0].values[name]) for name, value in ours[0].values.items()}
    ratios = {
        "wall": median(b.seconds / a.seconds for a, b in zip(ours, theirs, strict=True)),
        "cpu": median(b.cpu / a.cpu for a, b in zip(ours, theirs, strict=True)),
    }
    return {
        "seconds": {"ours": median(s.seconds for s in ours), "theirs": median(s.seconds for s in theirs)},
        "cpu": {"ours": median(s.cpu for s in ours), "theirs": median(s.cpu for s in theirs)},
        "ratio": ratios,
        "equal": f"{sum(gap < 1e-9 for gap in shared.values())} of {len(shared)} metrics",
        "largest_difference": max(shared.values()),
        "ours": dict(ours[0].values),
        "theirs": dict(theirs[0].values),
    }


@contextmanager
def work_folder(given: str) -> Iterator[Path]:
    """Yield the given folder, or one that is removed afterwards."""
    if given:
        Path(given).mkdir(parents=True, exist_ok=True)
        yield Path(given)
        return
    with TemporaryDirectory() as folder:
        yield Path(folder)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the figures, without and with the chat template; --smoke leaves the second out."""
    parser = make_parser(__doc__, f"{QUICK_LIMIT} items of each task, one pair")
    parser.add_argument("--pairs", type=int, default=3, help="runs of each, in turns; medians count")
    parser.add_argument("--limit", type=int, default=0, help="most items of each task; 0 takes all")
    parser.add_argument("--work", default="", help="folder that keeps the model folders for another call")
    parser.add_argument("--only", choices=["plain", "chat"], help="one of the two settings alone")
    options = parser.parse_args(argv)
    limit = SMOKE_LIMIT if options.smoke else QUICK_LIMIT if options.quick else options.limit
    pairs = 1 if options.smoke or options.quick else options.pairs
    result: dict[str, Any] = {}
    with work_folder(options.work) as folder:
        prepare(folder, SMOKE_PROMPTS if options.smoke else FIT_PROMPTS)
        for name, chat in (("plain", False), ("chat", True)):
            if options.only in (None, name) and not (options.smoke and chat):
                result[name] = measure_pairs(folder, limit, chat, pairs)
    result["facts"] = {"items of each task": limit or "all", "pairs": pairs, "machine": describe_machine()}
    print_report(result, options.json)


def measure_pairs(folder: Path, limit: int, chat: bool, pairs: int) -> dict[str, Any]:
    """Return the comparison of so many pairs, of which each other one begins with theirs."""
    spent: dict[str, list[Spent]] = {"ours": [], "theirs": []}
    runs = {"ours": run_ours, "theirs": run_theirs}
    for number in range(pairs):
        for name in list(runs)[:: 1 if number % 2 == 0 else -1]:
            say(f"{'chat' if chat else 'plain'}, pair {number + 1}: {name} …")
            spent[name].append(runs[name](folder, limit, chat))
    return compare(spent["ours"], spent["theirs"])


if __name__ == "__main__":
    main()
