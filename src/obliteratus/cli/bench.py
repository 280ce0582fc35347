"""The command bench: tasks of lm-evaluation-harness on a model and on its edits, with one load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from obliteratus.cli.options import (
    Device,
    Dtype,
    Json,
    Memory,
    Out,
    Quantize,
    Quiet,
    Served,
    Template,
    Thinking,
    Trust,
    Verbose,
    collect_opening,
    show_progress,
    start,
)
from obliteratus.core.errors import UserError

if TYPE_CHECKING:
    from obliteratus.benchmark.run import AskingStyle
    from obliteratus.benchmark.tasks import LoadedTasks
    from obliteratus.compare.benchmarks import BenchmarkSide
    from obliteratus.core.clock import Clock
    from obliteratus.core.types import Plan


def bench(
    model: Served,
    plan: Annotated[list[str] | None, typer.Option(help="Folder with a plan to compare. Several may be given.")] = None,
    tasks: Annotated[
        str,
        typer.Option(
            help="Tasks, with commas: arithmetic and reading are included, others are the harness's, or files."
        ),
    ] = "arithmetic,reading",
    strength: Annotated[float, typer.Option(help="Of the plans: 0 is the unedited model, 1 the plan; -1 to 2.")] = 1.0,
    shots: Annotated[
        int | None, typer.Option(min=0, help="Worked examples before each item. Default: the task's.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Most items of each task.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put items as turns of the model's chat template.")] = False,
    system: Annotated[str, typer.Option(help="Text of a system turn, or before each item without --chat.")] = "",
    include: Annotated[str, typer.Option(help="Folder with further tasks, as YAML files of the harness.")] = "",
    out: Out = None,
    memory: Memory = None,
    dtype: Dtype = "auto",
    quantize: Quantize = "",
    device: Device = "auto",
    trust_remote_code: Trust = False,
    thinking: Thinking = False,
    template: Template = "",
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Run benchmarks on a model and on its edits with one load, and pair their items.

    Needs lm-evaluation-harness: pip install 'obliteratus[bench]'.
    """
    opening = collect_opening(dtype, device, trust_remote_code, quantize, thinking, template)
    with show_progress(quiet, verbose) as clock:
        with start(clock):
            job = BenchJob.create(model, plan or [], strength, out)
            job.load(tasks, include, shots, {"chat": chat, "system": system, "limit": limit})
        with limit_memory(memory):
            sides = job.run(opening, clock)
    show_benchmarks(sides, job, json)


@dataclass
class BenchJob:
    """A request for benchmarks, checked as far as possible without the model."""

    model: str
    plans: list[str]
    strength: float
    out: Path | None
    tasks: LoadedTasks | None = None
    style: AskingStyle | None = None
    plain: dict[str, Any] = field(default_factory=dict)
    """The results as data for JSON, once there are any."""

    @classmethod
    def create(cls, model: str, plans: list[str], strength: float, out: Path | None) -> BenchJob:
        """Check what can be checked at once. Raises UserError."""
        from obliteratus.benchmark.tasks import require_harness
        from obliteratus.core.run_folder import check_free
        from obliteratus.serve.dial import check_strength

        require_harness()
        check_strength(strength)
        if out is not None:
            check_free(out)
        return cls(model, plans, strength, out)

    def load(self, names: str, include: str, shots: int | None, style: dict[str, Any]) -> None:
        """Load the tasks with their data. Raises UserError if that cannot be done."""
        from obliteratus.benchmark.run import AskingStyle
        from obliteratus.benchmark.tasks import load_tasks, split_names

        self.tasks = load_tasks(split_names(names), include, shots)
        self.style = AskingStyle(**style)
        self.plain = {"strength": self.strength, "shots": shots}

    def run(self, opening: dict[str, Any], clock: Clock) -> list[BenchmarkSide]:
        """Open the model once, run the tasks on it without and with each plan, and write what was found."""
        from obliteratus.compare.benchmarks import run_sides, to_plain
        from obliteratus.serve.open import open_for_chat

        assert self.tasks is not None, "tasks are loaded first"
        assert self.style is not None
        with clock.time("SUMMON"):
            subject, plans = open_for_chat(self.model, self.plans, opening)
        with clock.time("VERIFY"):
            sides = run_sides(subject, set_strength(plans, self.strength), self.tasks, self.style)
        self.plain |= to_plain(sides, self.model, self.tasks, self.style)
        if self.out is not None:
            write(sides, self.plain, self.out)
        return sides


def limit_memory(memory: str | None) -> AbstractContextManager[None]:
    """Return a context in which batches fit ``--memory``."""
    from obliteratus.core.choices import parse_size
    from obliteratus.inference.memory import memory_limit

    return memory_limit(parse_size(memory)) if memory else nullcontext()


def set_strength(plans: Mapping[str, Plan], strength: float) -> dict[str, Plan]:
    """Return the plans at a strength. Raises UserError if it is not 1 and there is no plan."""
    from obliteratus.core.types import Plan

    if strength != 1 and not plans:
        raise UserError(f"--strength {strength:g}: there is no plan whose strength could be set; give --plan FOLDER")
    if strength == 1:
        return dict(plans)
    return {name: plan.scaled(strength) if strength else Plan() for name, plan in plans.items()}


def write(sides: Sequence[BenchmarkSide], plain: Mapping[str, Any], out: Path) -> None:
    """Write the results and all items into the output folder."""
    from obliteratus.compare.benchmarks import write_benchmarks
    from obliteratus.core.run_folder import publish, workspace

    with workspace(out, {"bench": plain["model"]}, resume=False) as partial:
        folder = partial / "output"
        folder.mkdir(exist_ok=True)
        write_benchmarks(sides, plain, folder)
        publish(partial, out)


def show_benchmarks(sides: Sequence[BenchmarkSide], job: BenchJob, json: bool) -> None:
    """Print the table and what it says, or one JSON document."""
    from obliteratus.cli.terminal import say, show_json, show_table
    from obliteratus.compare.benchmarks import describe_benchmarks, list_benchmark_rows

    if json:
        show_json(job.plain)
        return
    how = "as chat turns" if job.plain["chat"] else "as plain text"
    columns, rows = ["task, metric (items)", "side", "score", "to base"], list_benchmark_rows(sides)
    if len(sides) == 1:
        columns, rows = [columns[0], columns[2]], [[row[0], row[2]] for row in rows]
    show_table(f"{job.model}: benchmarks, {how}, 95 % intervals, differences in points", columns, rows)
    for sentence in describe_benchmarks(sides):
        say(sentence, "Done")
    if job.out:
        say(f"{job.out} (bench.json and items.jsonl)", "Saved")
    elif len(sides) == 1:
        say("--plan FOLDER compares with an edit; --out FOLDER keeps every item.", "Next")
    else:
        say("--out FOLDER keeps every item with what each side made of it.", "Next")
