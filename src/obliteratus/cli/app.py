"""The command line. Every command parses, calls the library, and shows what came back."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated

import typer

from obliteratus.cli.analyze import analyze
from obliteratus.cli.inspect import inspect
from obliteratus.cli.options import (
    Base,
    Bypass,
    Control,
    Device,
    Dtype,
    Json,
    Keep,
    Memory,
    Model,
    Out,
    Quantise,
    Quiet,
    Resume,
    Save,
    Seed,
    Set,
    Target,
    Thinking,
    Trust,
    handle_errors,
    show_progress,
    with_seed,
)
from obliteratus.cli.study import report, study, study_from_yaml

app = typer.Typer(
    help="Find the directions by which a language model represents a behaviour, edit along them, prove what changed.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # a bug shows a plain traceback
    rich_markup_mode="rich",
)


@app.command()
@handle_errors
def run(
    model: Model,
    target: Target,
    control: Control,
    method: Annotated[str, typer.Option(help="A method's name, or a recipe file.")] = "basic",
    bypass: Bypass = None,
    keep: Keep = None,
    out: Out = None,
    save: Save = "merged",
    set_: Set = None,
    seed: Seed = None,
    resume: Resume = False,
    base: Base = "",
    dtype: Dtype = "auto",
    quantise: Quantise = "",
    device: Device = "auto",
    trust_remote_code: Trust = False,
    thinking: Thinking = False,
    self_test: Annotated[bool, typer.Option("--self-test", help="Try every claim of the architecture table.")] = False,
    memory: Memory = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Find the directions, edit, measure on held-out prompts, save."""
    from obliteratus.cli.jobs import Job, run_job, show_result

    overrides = with_seed(set_, seed)
    opening = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code, "quantise": quantise}
    opening |= {"thinking": thinking, "self_test": self_test}
    sources = {"target": target, "control": control, "bypass": bypass, "keep": keep}
    with show_progress(quiet):
        job = Job.checked(model, method, overrides, sources, out, save, base)
        done = run_job(job, opening, resume, memory)
    show_result(done, out, json)


@app.command()
@handle_errors
def search(
    model: Model,
    target: Target,
    control: Control,
    method: Annotated[str, typer.Option(help="A method's name, or a recipe file.")] = "optimized",
    trials: Annotated[int | None, typer.Option(min=1, help="Of the whole study; by default the recipe's.")] = None,
    storage: Annotated[str | None, typer.Option(help="Journal file or Optuna URL, for several workers.")] = None,
    study: Annotated[str | None, typer.Option(help="Its name there.")] = None,
    pick: Annotated[str, typer.Option(help="knee, first, last, or a member's number.")] = "knee",
    bypass: Bypass = None,
    keep: Keep = None,
    out: Out = None,
    save: Save = "merged",
    set_: Set = None,
    seed: Seed = None,
    resume: Resume = False,
    base: Base = "",
    dtype: Dtype = "auto",
    quantise: Quantise = "",
    device: Device = "auto",
    trust_remote_code: Trust = False,
    thinking: Thinking = False,
    memory: Memory = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Try a recipe's values on live plans, and save the best trade of refusals against damage."""
    from obliteratus.cli.jobs import Job, run_job, show_result

    overrides = with_seed(set_, seed)
    opening = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code, "quantise": quantise}
    opening |= {"thinking": thinking}
    sources = {"target": target, "control": control, "bypass": bypass, "keep": keep}
    with show_progress(quiet):
        job = Job.checked(model, method, overrides, sources, out, save, base).searching(trials, storage, study, pick)
        done = run_job(job, opening, resume, memory)
    show_result(done, out, json)


@app.command()
@handle_errors
def demo(
    method: Annotated[str, typer.Option(help="A method's name, or a recipe file.")] = "advanced",
    out: Out = None,
    save: Save = "merged",
    set_: Set = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """The main job on the embedded model organism: a small chat model that refuses to talk about astronomy."""
    from obliteratus.cli.jobs import Job, run_job, show_answers, show_result

    sources = {"target": "organism:astronomy", "control": "organism:astronomy"}
    with show_progress(quiet):
        job = Job.checked("organism:astronomy", method, set_ or [], sources, out, save)
        done = run_job(job, {}, resume=False)
    show_result(done, out, json)
    if not json:
        show_answers(done)


@app.command()
@handle_errors
def methods(name: Annotated[str | None, typer.Argument(help="Show this recipe.")] = None, json: Json = False) -> None:
    """The recipes: what each does, costs and cites; with a name, the recipe itself."""
    from obliteratus.cli.terminal import make_table, results, show_json
    from obliteratus.forecast.formula import COLUMNS, annotate_recipe, describe_cost, table_row
    from obliteratus.pipeline.recipe import list_methods, load_recipe

    chosen = {n: load_recipe(n) for n in ([name] if name else list_methods())}
    if json:
        show_json({n: {**r.model_dump(mode="json"), "cost": describe_cost(r)} for n, r in chosen.items()})
    elif name:
        results.out(annotate_recipe(chosen[name]), end="")
    else:
        results.print(make_table("Methods", COLUMNS, [table_row(r) for r in chosen.values()]))


@app.command()
@handle_errors
def verify(
    model: Model,
    target: Target,
    control: Control,
    keep: Keep = None,
    against: Annotated[str | None, typer.Option(help="Base model to compare with.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All prompts, not only the report part.")] = False,
    seed: Seed = None,
    dtype: Dtype = "auto",
    quantise: Quantise = "",
    device: Device = "auto",
    trust_remote_code: Trust = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure a model on held-out prompts, by itself or against its base."""
    from obliteratus.cli.jobs import compare_models
    from obliteratus.cli.terminal import show_comparison, show_json
    from obliteratus.prompts import load_prompts, parts_checked

    prompts = load_prompts(target, control, keep=keep)
    part = prompts if everything else parts_checked(prompts, seed or 0)[2]
    opening = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code, "quantise": quantise}
    with show_progress(quiet):
        before, after = compare_models(model, against, part, opening)
    show_json({"before": before, "after": after}) if json else show_comparison(model, against or "base", before, after)


@app.command()
@handle_errors
def apply(
    plan: Annotated[Path, typer.Argument(help="Folder with a saved plan.")],
    model: Model,
    out: Annotated[Path, typer.Option(help="Output folder; must not exist.")],
    save: Save = "merged",
    base: Base = "",
    dtype: Dtype = "auto",
    quantise: Quantise = "",
    device: Device = "auto",
    trust_remote_code: Trust = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Apply a saved plan to the model it was made for, and save the result."""
    from obliteratus.cli.jobs import apply_plan
    from obliteratus.cli.terminal import results, show_json

    opening = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code, "quantise": quantise}
    with show_progress(quiet):
        saved = apply_plan(plan, model, out, save, opening, base)
    show_json(saved) if json else results.print(f"[bold]Saved[/]   {out} ({save})")


for command in (inspect, analyze, study, report, study_from_yaml):
    app.command()(handle_errors(command))


def main() -> None:
    """Entry point. SIGTERM ends a run as Ctrl-C does."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    app(prog_name="obliteratus")


if __name__ == "__main__":
    main()
