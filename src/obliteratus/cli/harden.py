"""The command `harden`: make a refusal costly to remove, and measure whether it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from obliteratus.cli.options import (
    Behavior,
    Column,
    Control,
    Device,
    Dtype,
    Json,
    Model,
    Phrases,
    Quiet,
    Resume,
    Seed,
    SplitBy,
    Target,
    Trust,
    Verbose,
    check_split_by,
    collect_sources,
    show_progress,
    split_names,
    start,
)
from obliteratus.core.errors import UserError

if TYPE_CHECKING:
    from obliteratus.audit.settings import AuditSettings
    from obliteratus.core.clock import Clock
    from obliteratus.core.types import Splits
    from obliteratus.harden.run import Hardening
    from obliteratus.harden.settings import HardenSettings

Attacks = Annotated[str, typer.Option(help="Methods to train against, separated by commas: basic, leace …")]
Methods = Annotated[str, typer.Option(help="Methods that try to remove it before and after, as those of audit.")]
Wordings = Annotated[
    Path | None,
    typer.Option(help="Text file: other ways to say no, one a line; empty for the model's own words alone."),
]
Steps = Annotated[int | None, typer.Option(help="Training steps.")]
Save = Annotated[str, typer.Option("--save", help="What to save: merged (a whole model) or adapter (PEFT).")]
Quick = Annotated[bool, typer.Option("--quick", help="Measure with two methods and few prompts. Training is as usual.")]


def harden(
    model: Model,
    target: Target = None,
    control: Control = None,
    column: Column = None,
    behavior: Behavior = None,
    phrases: Phrases = None,
    *,
    out: Annotated[Path, typer.Option(help="Folder for the hardened model, its card and harden.json; must not exist.")],
    attacks: Attacks = "",
    methods: Methods = "",
    wordings: Wordings = None,
    steps: Steps = None,
    quick: Quick = False,
    save: Save = "merged",
    resume: Resume = False,
    seed: Seed = None,
    split_by: SplitBy = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: Trust = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Train a refusal to stay when the weights are edited, and measure what its removal costs."""
    with show_progress(quiet, verbose) as clock:
        with start(clock):
            from obliteratus.audit.attacks import load_methods
            from obliteratus.cli.jobs import load_with_examples
            from obliteratus.core.settings import JudgeSettings
            from obliteratus.harden.attack import load_attacks
            from obliteratus.harden.save import check_hardened_form
            from obliteratus.prompts import split_prompts

            form = check_hardened_form(save)
            said = choose_wordings(wordings, behavior)
            settings = choose_settings(attacks, said, steps, seed or 0)
            checks = choose_checks(methods, quick, seed or 0)
            load_attacks(settings.attacks)
            load_methods(checks.methods)
            judging = JudgeSettings(behavior=behavior or "refusal", phrases=phrases or "")
            sources = collect_sources(column, target=target, control=control)
            prompts = load_with_examples(sources, judging)
            splits = split_prompts(prompts, seed or 0, uses_search_split=True, split_by=check_split_by(split_by))
        opening = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
        request = Request(model, opening, judging, splits, settings, checks, form, prompts.sources)
        done = run_request(request, out, resume, clock)
    show_hardening(done, request, out, clock, json)


@dataclass(frozen=True)
class Request:
    """What is to be hardened, checked as far as possible without the model."""

    model: str
    opening: Mapping[str, Any]
    judging: Any
    splits: Splits
    settings: HardenSettings
    checks: AuditSettings
    form: Any
    sources: Mapping[str, str]
    """Where the prompts come from, by group."""

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same for an interrupted run to resume."""
        from obliteratus.summon.fingerprint import fingerprint_files

        return {
            "model": self.model,
            "prompts": self.splits.digest,
            "settings": self.settings.model_dump(mode="json"),
            "measurements": self.checks.model_dump(mode="json"),
            "judge": self.judging.model_dump(mode="json"),
            "form": self.form,
            "loading": dict(self.opening),
            **fingerprint_files(self.model),
        }


def choose_wordings(file: Path | None, behavior: str | None) -> tuple[str, ...]:
    """Return the wordings in a file, one a line; without one those for refusals, and none for another behavior.

    Raises UserError for a file that is missing or not text.
    """
    from obliteratus.harden.settings import DEFAULT

    if file is None:
        return DEFAULT.wordings if behavior in (None, "refusal") else ()
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--wordings {file}: cannot be read as text ({type(error).__name__}); give a text file"
        ) from error
    return tuple(dict.fromkeys(line.strip() for line in lines if line.strip()))


def choose_settings(attacks: str, wordings: tuple[str, ...], steps: int | None, seed: int) -> HardenSettings:
    """Return how to train. Raises UserError for less than one step."""
    from obliteratus.harden.settings import DEFAULT

    if steps is not None and steps < 1:
        raise UserError(f"--steps {steps}: give 1 or more")
    names = split_names(attacks)
    changes: dict[str, Any] = {"seed": seed, "wordings": wordings} | ({"attacks": names} if names else {})
    return DEFAULT.model_copy(update=changes | ({} if steps is None else {"steps": steps}))


def choose_checks(methods: str, quick: bool, seed: int) -> AuditSettings:
    """Return how the cost of removal is measured."""
    from obliteratus.audit.settings import QUICK
    from obliteratus.harden.measure import CHECKS

    names = split_names(methods)
    return (QUICK if quick else CHECKS).model_copy(update={"seed": seed} | ({"methods": names} if names else {}))


def run_request(request: Request, out: Path, resume: bool, clock: Clock) -> Hardening:
    """Open the model, train, measure, and write the folder, which appears when it is complete."""
    from obliteratus.cli.jobs import open_at_kept_time
    from obliteratus.core.run_folder import Store, publish, workspace
    from obliteratus.harden.output import write_hardening
    from obliteratus.harden.run import OUTPUT, HardenJob, harden_model
    from obliteratus.verify.ladder import build_judge

    with workspace(out, request.identity, resume) as partial:
        with clock.time("SUMMON"):
            subject = open_at_kept_time(request.model, request.opening, partial)
        judge = build_judge(request.judging, subject)
        job = HardenJob(subject, request.splits, request.settings, request.checks, judge, request.form)
        done = harden_model(job, Store(partial, clock))
        write_hardening(done, partial / OUTPUT, request.sources)
        publish(partial, out)
    return done


def show_hardening(done: Hardening, request: Request, out: Path, clock: Clock, json: bool) -> None:
    """Print the document, or what was measured."""
    from obliteratus.cli.stage_names import format_times
    from obliteratus.cli.terminal import say, show_json, show_table
    from obliteratus.harden.output import COLUMNS, describe_hardening, list_rows, to_dict

    if json:
        show_json(to_dict(done, request.sources))
        return
    show_table(f"How firm {done.behavior} is", COLUMNS, list_rows(done))
    say(format_times(clock.account()), "Time")
    say(f"{out} ({done.form})", "Saved")
    say(describe_hardening(done), "Done")
    say(suggest_next(done, request, out), "Next")


def suggest_next(done: Hardening, request: Request, out: Path) -> str:
    """Return what to do next: other attackers, or what a refusal of controls calls for."""
    if done.effect.control_change.low > 0:
        return "More control prompts, near the target's topic above all, keep it from refusing those too."
    if done.form == "adapter":
        return "--save merged saves a whole model: an adapter can be left out by whoever loads it."
    groups = " ".join(f"--{group} {request.sources[group]}" for group in ("target", "control"))
    return f"obliteratus audit {out} {groups} --methods balanced,tuned --out DIR lets others attack it."
