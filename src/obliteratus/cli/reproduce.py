"""The command reproduce: do a recorded run again, and say what differs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from obliteratus.cli.options import (
    Deterministic,
    Json,
    JudgeUrl,
    Memory,
    Plugin,
    Quiet,
    Resume,
    Set,
    Trust,
    Verbose,
    show_progress,
    start,
)
from obliteratus.core.errors import UserError
from obliteratus.core.run_folder import require_file

if TYPE_CHECKING:
    from obliteratus.cli.jobs import Job, JobResult
    from obliteratus.core.settings import Recipe
    from obliteratus.share.compare_runs import Reproduction
    from obliteratus.share.recorded import Recorded

DIFFERS = 3
"""Exit code of a run that was repeated, and differs by more than its tolerances."""
MOST_SHOWN = 12  # conditions that the terminal lists; more of them say no more

Source = Annotated[
    str, typer.Argument(metavar="FILE|RUN_DIR|HUB", help="reproduce.json, a run's output folder, or hub:owner/name.")
]
Model = Annotated[str | None, typer.Option(help="Where the model is here, if not where it was.")]
Group = Annotated[str | None, typer.Option(help="Where these prompts are here, if not where they were.")]
Out = Annotated[Path | None, typer.Option(help="Output folder. The default is a new one here, NAME-again.")]
Save = Annotated[str, typer.Option(help="What to save: merged, adapter or plan.")]
Anyway = Annotated[
    bool, typer.Option("--anyway", help="Go on even if the model or the prompts are not those of the run.")
]
Check = Annotated[bool, typer.Option("--check", help="Only say whether all that it takes is here.")]


def reproduce(
    source: Source,
    model: Model = None,
    target: Group = None,
    control: Group = None,
    bypass: Group = None,
    benign: Group = None,
    keep: Group = None,
    out: Out = None,
    save: Save = "plan",
    set_: Set = None,
    plugin: Plugin = None,
    anyway: Anyway = False,
    check: Check = False,
    deterministic: Deterministic = False,
    trust_remote_code: Trust = False,
    judge_url: JudgeUrl = None,
    memory: Memory = None,
    resume: Resume = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Do a run again, compare its plan and scores with the recorded ones, and say what differs.

    Exit codes: 0 the plan and all scores are within their tolerances; 3 they are not; 2 the model or the prompts are
    missing or are others.
    """
    if not source.startswith("hub:") and not Path(source).is_file():
        require_file(Path(source), "reproduce.json", "the file, the output folder of a run, or hub:owner/name")
    groups = {"target": target, "control": control, "bypass": bypass, "keep": keep, "benign": benign}
    with show_progress(quiet, verbose) as clock:
        with start(clock, plugins=plugin):
            from obliteratus.cli.jobs import fix_bits, name_free_folder, run_job
            from obliteratus.inference.determinism import without_probe_cache
            from obliteratus.share.recorded import find_recorded

            recorded = find_recorded(source)
            place = None if check else out or name_free_folder(Path.cwd(), f"{_short_name(recorded)}-again", resume)
            given = Given(model or "", groups, place, save, set_ or [], anyway, trust_remote_code, judge_url or "")
            repeat = prepare(recorded, given)
        with clock.time("FILES", goes_on=not check):
            check_everything(recorded, repeat, anyway)
        if check:
            show_check(repeat, json)
            return
        fixed = recorded.file.deterministic
        threads, room = (fixed.threads, fixed.memory) if fixed else (0, 0)
        bits = fix_bits(deterministic or fixed is not None, threads, room)
        limit = memory or recorded.file.request.memory
        with without_probe_cache():
            done = run_job(repeat.job, repeat.opening, clock, resume, limit, fixed=bits)
    found = conclude(recorded, repeat, done)
    show_reproduction(found, place, json)
    if not found.is_met:
        raise typer.Exit(DIFFERS)


@dataclass(frozen=True)
class Given:
    """What the user says beside the run to repeat."""

    model: str
    groups: Mapping[str, str | None]
    out: Path | None
    form: str
    overrides: Sequence[str]
    anyway: bool
    trust: bool
    judge_url: str


@dataclass
class Repeat:
    """A run that is about to be repeated."""

    job: Job
    opening: dict[str, Any]
    conditions: list[str] = field(default_factory=list)
    """What is not as it was."""


def _short_name(recorded: Recorded) -> str:
    name = recorded.name.removeprefix("hub:").partition("@")[0].rstrip("/")
    path = Path(name)
    return path.name if recorded.name.startswith("hub:") or path.is_dir() else recorded.folder.resolve().name


# ------------------------------------------------------------------------------------------ before the run
def prepare(recorded: Recorded, given: Given) -> Repeat:
    """Return the run to repeat. Raises UserError for what is missing, and what the user has to allow."""
    from obliteratus.cli.jobs import Job
    from obliteratus.rebirth.save import check_form
    from obliteratus.share.recorded import choose_model, choose_sources, is_shared

    asked, file = recorded.file.request, recorded.file
    recipe = restore_recipe(recorded, given)
    model = choose_model(recorded, given.model)
    sources: dict[str, Any] = dict(choose_sources(recorded, given.groups))
    sources["column"] = {g: one.column for g, one in file.prompts.items() if not is_shared(sources[g])}
    check_form(given.form, model=model)
    job = Job.from_recipe(model, recipe, sources, given.out, given.form, force=asked.force)
    if recipe.search is not None:
        job = job.with_search(pick=asked.pick)
    return Repeat(job, restore_opening(recorded, given))


def restore_opening(recorded: Recorded, given: Given) -> dict[str, Any]:
    """Return how the run opened its model. Raises UserError if it ran code that the user does not allow."""
    from obliteratus.core.chat import ChatFormat

    asked = recorded.file.request
    if asked.trust_remote_code and not given.trust:
        raise UserError(
            f"{recorded.name}: the run ran Python code of the model; add --trust-remote-code if you trust it"
        )
    chat = ChatFormat(asked.thinking, asked.template, asked.now)
    revision = recorded.file.model.revision if not given.model else ""
    opening = {"dtype": asked.dtype, "device": asked.device, "quantize": asked.quantize, "chat": chat}
    return opening | {"trust_remote_code": given.trust, "revision": revision}


def restore_recipe(recorded: Recorded, given: Given) -> Recipe:
    """Return the recipe of the run, with what the user sets.

    Raises UserError for a path in it that belongs to another machine, and for a judge at an address that the user did
    not name: prompts, answers and the user's key would be sent there.
    """
    from obliteratus.core.toml import parse_overrides
    from obliteratus.pipeline.recipe import parse_recipe, replace_values
    from obliteratus.share.clean import find_hidden

    recipe = parse_recipe(recorded.file.recipe, recorded.name)
    changes = parse_overrides(list(given.overrides))
    if given.judge_url:
        changes["judge.url"] = given.judge_url
    if recipe.judge.url and "judge.url" not in changes:
        raise UserError(f"{recorded.name}: the run asked {recipe.judge.url} to judge; add --judge-url to ask it too")
    recipe = replace_values(recipe, changes, recorded.name) if changes else recipe
    for path, value in find_hidden(recipe.model_dump(mode="json")):
        raise UserError(
            f"{recorded.name}: {path} of the recipe is a path of another machine, {value}; add --set '{path}=…' with "
            "where it is here"
        )
    return recipe


def check_everything(recorded: Recorded, repeat: Repeat, anyway: bool) -> None:
    """Compare prompts, model and releases with those of the run, and note what differs.

    Raises UserError if prompts or model are others, unless anyway: then that is noted too.
    """
    from obliteratus.core.progress import note
    from obliteratus.share.check import check_model, check_prompts, list_conditions
    from obliteratus.share.hardware import list_versions
    from obliteratus.share.model_files import fetch_model_files, sum_model_files
    from obliteratus.share.reproduce_file import find_made_as

    then, model = recorded.file, repeat.job.model
    revision = repeat.opening["revision"]
    fetch_model_files(model, revision, then.model.files)
    sums = sum_model_files(model, revision)
    checks = (
        lambda: check_prompts(then.prompts, repeat.job.prompts),
        lambda: check_model(then.model, model, sums, find_made_as(model)),
    )
    for run in checks:
        try:
            said = run()
        except UserError as error:
            if not anyway:
                raise
            said = str(error).partition("; give")[0]
        if said:
            repeat.conditions.append(said)
    repeat.conditions += list_conditions(then.versions, list_versions(), "release")
    repeat.conditions += [f"recipe: {path} is not in the file" for path in then.left_out]
    for line in repeat.conditions[:MOST_SHOWN]:
        note("reproduce", line)


# ------------------------------------------------------------------------------------------ after the run
def conclude(recorded: Recorded, repeat: Repeat, done: JobResult) -> Reproduction:
    """Compare what came out with what is recorded, and keep the comparison in the output folder."""
    from obliteratus.excise.plan import load_plan
    from obliteratus.share.check import list_conditions
    from obliteratus.share.compare_plans import PlanComparison, compare_plans
    from obliteratus.share.compare_runs import Reproduction, compare_scores, write_reproduction
    from obliteratus.share.reproduce_file import FILE, parse_reproduce_file

    assert repeat.job.out is not None
    then, now = recorded.file, parse_reproduce_file(repeat.job.out / FILE, str(repeat.job.out))
    plan = PlanComparison(True) if now.plan.digest == then.plan.digest else None
    if plan is None and recorded.plan is not None:
        plan = compare_plans(recorded.plan, load_plan(repeat.job.out))
    found = Reproduction(
        conditions=(*repeat.conditions, *list_conditions(then.hardware, now.hardware, "machine")),
        plan=plan,
        tolerance=then.plan.tolerance,
        scores=len(then.before) + len(then.after),
        differences=tuple(compare_scores(then, done.run.before, done.run.after)),
    )
    write_reproduction(found, repeat.job.out)
    return found


def show_check(repeat: Repeat, json: bool) -> None:
    """Print what is not as it was."""
    from obliteratus.cli.terminal import say, show_json

    if json:
        show_json({"conditions": repeat.conditions})
        return
    _show_conditions(repeat.conditions)
    say("Everything that the run needs is here.", "Done")


def _show_conditions(conditions: Sequence[str]) -> None:
    from obliteratus.cli.terminal import say

    for line in conditions[:MOST_SHOWN]:
        say(line, "Differs")
    if len(conditions) > MOST_SHOWN:
        say(f"and {len(conditions) - MOST_SHOWN} more", "Differs")
    if not conditions:
        say("Model, prompts, releases and machine are as they were.", "Same")


def show_reproduction(found: Reproduction, out: Path | None, json: bool) -> None:
    """Print what differs in a few lines, or one JSON document."""
    from obliteratus.cli.terminal import say, show_json
    from obliteratus.share.compare_runs import REPRODUCTION

    if json:
        show_json(found.to_dict())
        return
    _show_conditions(found.conditions)
    say(describe_plan(found), "Plan")
    say(describe_scores(found), "Scores")
    show_differences(found)
    say(f"{out}, with the comparison in {REPRODUCTION}", "Saved")
    say(describe_end(found), "Done")


def describe_plan(found: Reproduction) -> str:
    """Return how the two plans compare."""
    plan = found.plan
    if plan is None:
        return "not the same bits, and only the digest of the earlier plan is known: the scores decide"
    if plan.bitwise:
        return "the same, bit by bit"
    if plan.structure:
        return f"another one: {plan.structure}"
    verdict = "within" if plan.is_within(found.tolerance) else "beyond"
    return (
        f"not the same bits: an edit differs by at most {plan.largest:.2g} of its size ({plan.where}), {verdict} the "
        f"tolerance of {found.tolerance:g}"
    )


def describe_scores(found: Reproduction) -> str:
    """Return how many scores are the same, within their tolerance, and beyond it."""
    same, beyond = found.scores - len(found.differences), len(found.beyond)
    within = len(found.differences) - beyond
    parts = [f"{same} of {found.scores} are the same to the last digit"]
    parts += [f"{within} within tolerance"] if within else []
    parts += [f"{beyond} beyond tolerance"] if beyond else []
    return ", ".join(parts)


def show_differences(found: Reproduction) -> None:
    """Print a table of the scores that differ by more than is allowed."""
    from obliteratus.cli.terminal import show_table

    if found.beyond:
        rows = [[one.name, _number(one.then), _number(one.now), f"{one.allowed:.3g}"] for one in found.beyond]
        show_table("Scores beyond tolerance", ["score", "then", "now", "allowed"], rows)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def describe_end(found: Reproduction) -> str:
    """Return the conclusion in one sentence."""
    if not found.is_met:
        return "Not reproduced: something differs by more than its tolerance."
    if found.plan is not None and found.plan.bitwise and not found.differences:
        return "Reproduced: the plan and all scores are the same, bit by bit."
    return "Reproduced: whatever differs is within its tolerance."
