"""Define the command line. Every command parses its options, calls the library, and shows the result."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Annotated, cast

import typer

from obliteratus.cli.analyze import analyze
from obliteratus.cli.behaviors import behaviors
from obliteratus.cli.bench import bench
from obliteratus.cli.chat import chat
from obliteratus.cli.inspect import inspect
from obliteratus.cli.judge import judge
from obliteratus.cli.options import (
    Base,
    Behavior,
    Bypass,
    Column,
    Commands,
    Control,
    Deterministic,
    Device,
    Dtype,
    Force,
    Json,
    JudgedBy,
    JudgeModel,
    JudgeUrl,
    Keep,
    Memory,
    Model,
    NoOwnWords,
    Out,
    Phrases,
    Quantize,
    Quiet,
    Resume,
    Save,
    Seed,
    Set,
    SplitBy,
    Target,
    Template,
    Thinking,
    Trust,
    Verbose,
    handle_errors,
    parse_columns,
    show_progress,
    with_judge,
    with_split,
)
from obliteratus.cli.push import push
from obliteratus.cli.reproduce import reproduce
from obliteratus.cli.serve import serve
from obliteratus.cli.side_by_side import compare
from obliteratus.cli.study import report, study
from obliteratus.cli.trace import trace
from obliteratus.cli.ui import ui
from obliteratus.core.chat import ChatFormat

app = typer.Typer(
    cls=Commands,
    help="Find the directions by which a language model represents a behavior, edit the weights along them, and "
    "measure on held-out prompts what changed.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # a bug shows a plain traceback
    rich_markup_mode="rich",
)
Method = Annotated[str, typer.Option(help="Name of a method, or a recipe file.")]
Trials = Annotated[int | None, typer.Option(min=1, help="Trials of the whole study. The default is the recipe's.")]
Storage = Annotated[str | None, typer.Option(help="Journal file or Optuna URL, so that several workers share a study.")]
Pick = Annotated[
    str, typer.Option(help="Member of the front to save: balanced (nearest to the ideal), first, last, or a number.")
]


@app.command()
@handle_errors
def run(
    model: Model,
    target: Target = None,
    control: Control = None,
    method: Method = "least_change",
    bypass: Bypass = None,
    keep: Keep = None,
    column: Column = None,
    behavior: Behavior = None,
    phrases: Phrases = None,
    judge: JudgedBy = None,
    judge_url: JudgeUrl = None,
    judge_model: JudgeModel = None,
    no_own_words: NoOwnWords = False,
    out: Out = None,
    save: Save = "",
    set_: Set = None,
    seed: Seed = None,
    split_by: SplitBy = None,
    resume: Resume = False,
    force: Force = False,
    base: Base = "",
    dtype: Dtype = "auto",
    quantize: Quantize = "",
    device: Device = "auto",
    trust_remote_code: Trust = False,
    thinking: Thinking = False,
    template: Template = "",
    self_test: Annotated[
        bool, typer.Option("--self-test", help="Check every claim of the architecture table on this model.")
    ] = False,
    memory: Memory = None,
    deterministic: Deterministic = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Find the directions, edit the model, measure on held-out prompts, and save the result."""
    changes = with_judge(
        with_split(set_, seed, split_by), behavior, phrases, judge, judge_url, judge_model, no_own_words
    )
    opening = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code, "quantize": quantize}
    opening |= {"chat": ChatFormat(thinking, template), "self_test": self_test}
    sources = {"target": target, "control": control, "bypass": bypass, "keep": keep, "column": parse_columns(column)}
    with show_progress(quiet, verbose) as clock:
        with clock.time("START"):
            from obliteratus.cli.jobs import Job, fix_bits, run_job, show_result

            job = Job.create(model, method, changes, sources, out, save, base, force)
        result = run_job(job, opening, clock, resume, memory, fixed=fix_bits(deterministic))
    show_result(result, out, json)


@app.command()
@handle_errors
def search(
    model: Model,
    target: Target = None,
    control: Control = None,
    method: Method = "leace_search",
    trials: Trials = None,
    storage: Storage = None,
    study: Annotated[str | None, typer.Option(help="Optuna study name.")] = None,
    pick: Pick = "balanced",
    bypass: Bypass = None,
    keep: Keep = None,
    column: Column = None,
    behavior: Behavior = None,
    phrases: Phrases = None,
    judge: JudgedBy = None,
    judge_url: JudgeUrl = None,
    judge_model: JudgeModel = None,
    no_own_words: NoOwnWords = False,
    out: Out = None,
    save: Save = "",
    set_: Set = None,
    seed: Seed = None,
    split_by: SplitBy = None,
    resume: Resume = False,
    force: Force = False,
    base: Base = "",
    dtype: Dtype = "auto",
    quantize: Quantize = "",
    device: Device = "auto",
    trust_remote_code: Trust = False,
    thinking: Thinking = False,
    template: Template = "",
    memory: Memory = None,
    deterministic: Deterministic = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Search the values of a recipe, and save the best trade-off between refusals and damage."""
    changes = with_judge(
        with_split(set_, seed, split_by), behavior, phrases, judge, judge_url, judge_model, no_own_words
    )
    opening = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code, "quantize": quantize}
    opening |= {"chat": ChatFormat(thinking, template)}
    sources = {"target": target, "control": control, "bypass": bypass, "keep": keep, "column": parse_columns(column)}
    with show_progress(quiet, verbose) as clock:
        with clock.time("START"):
            from obliteratus.cli.jobs import Job, fix_bits, run_job, show_result

            job = Job.create(model, method, changes, sources, out, save, base, force)
        job = job.with_search(trials, storage, study, pick)
        result = run_job(job, opening, clock, resume, memory, fixed=fix_bits(deterministic))
    show_result(result, out, json)


@app.command()
@handle_errors
def demo(
    method: Method = "lean",
    out: Annotated[
        Path | None, typer.Option(help="Output folder. The default is a new one here, obliteratus-demo.")
    ] = None,
    save: Annotated[str, typer.Option(help="What to save: merged, adapter or plan.")] = "plan",
    set_: Set = None,
    resume: Resume = False,
    deterministic: Deterministic = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Run a method on the included model organism, a small chat model that refuses to talk about astronomy.

    The result is a page with all answers before and after, and the plan of the edit.
    """
    sources = {"target": "organism:astronomy", "control": "organism:astronomy"}
    with show_progress(quiet, verbose) as clock:
        with clock.time("START"):
            from obliteratus.cli.jobs import EXAMPLES, Job, fix_bits, name_free_folder, run_job, show_result

            out = out or name_free_folder(Path.cwd(), "obliteratus-demo", resume)
            job = Job.create("organism:astronomy", method, set_ or [], sources, out, save)
        examples = 0 if json else EXAMPLES
        result = run_job(job, {}, clock, resume, examples=examples, fixed=fix_bits(deterministic))
    show_result(result, out, json)


@app.command()
@handle_errors
def methods(
    name: Annotated[str | None, typer.Argument(help="Method whose recipe to show.")] = None, json: Json = False
) -> None:
    """List the methods with what each does and costs, or show the recipe of one with its memory and citations."""
    from obliteratus.cli.methods import show_methods
    from obliteratus.cli.terminal import results, show_json
    from obliteratus.forecast.formula import annotate_recipe, describe_cost
    from obliteratus.pipeline.recipe import list_methods, load_recipe

    chosen = {n: load_recipe(n) for n in ([name] if name else list_methods())}
    if json:
        show_json({n: {**r.model_dump(mode="json"), "cost": describe_cost(r)} for n, r in chosen.items()})
    elif name:
        results.out(annotate_recipe(chosen[name]), end="")
    else:
        show_methods(list(chosen.values()))


@app.command()
@handle_errors
def verify(
    model: Model,
    target: Target = None,
    control: Control = None,
    keep: Keep = None,
    column: Column = None,
    behavior: Behavior = None,
    phrases: Phrases = None,
    judge: JudgedBy = None,
    judge_url: JudgeUrl = None,
    judge_model: JudgeModel = None,
    no_own_words: NoOwnWords = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder for verify.json and every answer. It must not exist yet.")
    ] = None,
    against: Annotated[str | None, typer.Option(help="Base model to compare with.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Use all prompts, not only the report split.")] = False,
    seed: Seed = None,
    split_by: SplitBy = None,
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
    """Measure a model on held-out prompts, by itself or against its base."""
    choices = with_judge([], behavior, phrases, judge, judge_url, judge_model, no_own_words)
    sources = {"target": target, "control": control, "keep": keep, "column": parse_columns(column)}
    opening = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code, "quantize": quantize}
    opening |= {"chat": ChatFormat(thinking, template)}
    with show_progress(quiet, verbose) as clock:
        with clock.time("START"):
            from obliteratus.cli.compare import Comparison, show_compared

            comparison = Comparison.create(choices, sources, seed, everything, out, split_by)
        found = comparison.run(model, against, opening, clock)
    show_compared(found, model, against, out, json)


@app.command()
@handle_errors
def apply(
    plan: Annotated[Path, typer.Argument(help="Folder with a saved plan.")],
    model: Model,
    out: Annotated[Path, typer.Option(help="Output folder, or NAME.gguf for a GGUF file. It must not exist yet.")],
    save: Save = "",
    base: Base = "",
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
    """Apply a saved plan to the model it was made for, and save the result."""
    opening = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code, "quantize": quantize}
    opening |= {"chat": ChatFormat(thinking, template)}
    with show_progress(quiet, verbose) as clock:
        with clock.time("START"):
            from obliteratus.cli.apply import apply_plan, show_applied
        saved = apply_plan(plan, model, out, save, opening, clock, base)
    show_applied(saved, out, json)


for command in (
    *(chat, inspect, behaviors, judge, analyze, study, report, compare, trace, bench, ui, serve, reproduce),
    push,
):
    app.command()(handle_errors(command))


def main() -> None:
    """Run the command line. In a locale that lacks a character, its code is shown."""
    for stream in (sys.stdout, sys.stderr):
        cast(io.TextIOWrapper, stream).reconfigure(errors="backslashreplace")
    app(prog_name="obliteratus")


if __name__ == "__main__":
    main()
