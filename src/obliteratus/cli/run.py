"""The commands run, search and demo: find the directions, edit the model, measure, and save the result."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from obliteratus.cli.options import (
    Base,
    Behavior,
    Benign,
    Bypass,
    Column,
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
    Plugin,
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
    collect_opening,
    collect_sources,
    show_progress,
    start,
    with_judge,
    with_split,
)

Method = Annotated[str, typer.Option(help="Name of a method, or a recipe file.")]
Trials = Annotated[int | None, typer.Option(min=1, help="Trials of the whole study. The default is the recipe's.")]
Storage = Annotated[str | None, typer.Option(help="Journal file or Optuna URL, so that several workers share a study.")]
Pick = Annotated[
    str, typer.Option(help="Member of the front to save: balanced (nearest to the ideal), first, last, or a number.")
]


def run(
    model: Model,
    target: Target = None,
    control: Control = None,
    method: Method = "balanced",
    bypass: Bypass = None,
    keep: Keep = None,
    benign: Benign = None,
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
    plugin: Plugin = None,
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
    changes = with_split(set_, seed, split_by)
    changes = with_judge(changes, behavior, phrases, judge, judge_url, judge_model, no_own_words)
    opening = collect_opening(dtype, device, trust_remote_code, quantize, thinking, template) | {"self_test": self_test}
    sources = collect_sources(column, target=target, control=control, bypass=bypass, keep=keep, benign=benign)
    with show_progress(quiet, verbose) as clock:
        with start(clock, plugins=plugin):
            from obliteratus.cli.jobs import Job, fix_bits, run_job, show_result

            job = Job.create(model, method, changes, sources, out, save, base, force)
        result = run_job(job, opening, clock, resume, memory, fixed=fix_bits(deterministic))
    show_result(result, out, json)


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
    benign: Benign = None,
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
    plugin: Plugin = None,
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
    changes = with_split(set_, seed, split_by)
    changes = with_judge(changes, behavior, phrases, judge, judge_url, judge_model, no_own_words)
    opening = collect_opening(dtype, device, trust_remote_code, quantize, thinking, template)
    sources = collect_sources(column, target=target, control=control, bypass=bypass, keep=keep, benign=benign)
    with show_progress(quiet, verbose) as clock:
        with start(clock, plugins=plugin):
            from obliteratus.cli.jobs import Job, fix_bits, run_job, show_result

            job = Job.create(model, method, changes, sources, out, save, base, force)
        job = job.with_search(trials, storage, study, pick)
        result = run_job(job, opening, clock, resume, memory, fixed=fix_bits(deterministic))
    show_result(result, out, json)


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
        with start(clock):
            from obliteratus.cli.jobs import EXAMPLES, Job, fix_bits, name_free_folder, run_job, show_result

            out = out or name_free_folder(Path.cwd(), "obliteratus-demo", resume)
            job = Job.create("organism:astronomy", method, set_ or [], sources, out, save)
        examples = 0 if json else EXAMPLES
        result = run_job(job, {}, clock, resume, examples=examples, fixed=fix_bits(deterministic))
    show_result(result, out, json)
