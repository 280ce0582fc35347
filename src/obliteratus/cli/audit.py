"""The command `audit`: how firm a behavior is against edits of the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    from obliteratus.audit.results import AuditReport
    from obliteratus.audit.settings import AuditSettings
    from obliteratus.core.clock import Clock
    from obliteratus.core.types import Prompt, Splits

Benign = Annotated[str | None, typer.Option(help="Prompts that should be answered, to count false refusals on.")]
Rewordings = Annotated[
    list[str] | None,
    typer.Option(help="NAME=SRC: further wordings or translations of target prompts, to see whether it returns there."),
]
Methods = Annotated[str, typer.Option(help="Methods that try to remove it, separated by commas.")]
Quick = Annotated[bool, typer.Option("--quick", help="Two methods and few prompts: a first look.")]
Budget = Annotated[
    int | None,
    typer.Option(help="Most forward passes. Costs of removal always run, of the rest the cheapest first."),
]


def audit(
    model: Model,
    target: Target = None,
    control: Control = None,
    benign: Benign = None,
    rewordings: Rewordings = None,
    column: Column = None,
    behavior: Behavior = None,
    phrases: Phrases = None,
    *,
    out: Annotated[Path, typer.Option(help="Folder for index.html and audit.json; must not exist.")],
    methods: Methods = "",
    quick: Quick = False,
    report_prompts: Annotated[int | None, typer.Option("--prompts", help="Most report prompts of each group.")] = None,
    budget: Budget = None,
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
    """Measure how firm a refusal is: what its removal costs, what carries it, and where it returns."""
    with show_progress(quiet, verbose) as clock:
        with start(clock):
            from obliteratus.analyze.pass_budget import check_budget
            from obliteratus.audit.attacks import load_methods
            from obliteratus.cli.jobs import load_with_examples
            from obliteratus.core.settings import JudgeSettings
            from obliteratus.prompts import read_prompts, split_prompts

            check_budget(budget)
            judging = JudgeSettings(behavior=behavior or "refusal", phrases=phrases or "")
            sources = collect_sources(column, target=target, control=control)
            prompts = load_with_examples(sources, judging)
            settings = choose_settings(methods, quick, seed or 0, report_prompts)
            load_methods(settings.methods)
            splits = split_prompts(prompts, seed or 0, uses_search_split=True, split_by=check_split_by(split_by))
            others = {name: read_prompts(source) for name, source in parse_rewordings(rewordings).items()}
            kept = read_prompts(benign) if benign else ()
        opening = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
        request = Request(model, opening, judging, splits, settings, kept, others, budget, prompts.sources)
        report = run_request(request, out, resume, clock)
    show_audit(report, out, clock, json)


@dataclass(frozen=True)
class Request:
    """What is to be audited, checked as far as possible without the model."""

    model: str
    opening: Mapping[str, Any]
    judging: Any
    splits: Splits
    settings: AuditSettings
    benign: Sequence[Prompt]
    rewordings: Mapping[str, Sequence[Prompt]]
    budget: int | None
    sources: Mapping[str, str]
    """Where the prompts come from, by group."""

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same for an interrupted audit to resume."""
        from obliteratus.core.types import digest_of
        from obliteratus.summon.fingerprint import fingerprint_files

        others = {"benign": self.benign, **self.rewordings}
        return {
            "model": self.model,
            "prompts": self.splits.digest,
            "other prompts": digest_of({name: [[p.text, *p.context] for p in ps] for name, ps in others.items()}),
            "settings": self.settings.model_dump(mode="json"),
            "judge": self.judging.model_dump(mode="json"),
            "loading": dict(self.opening),
            **fingerprint_files(self.model),
        }

    def count_prompts(self) -> dict[str, int]:
        """Return the number of prompts by what they are for."""
        splits = {"fit": self.splits.fit, "search": self.splits.search, "report": self.splits.report}
        counts = {
            f"{group} to {name}": len(part[group]) for name, part in splits.items() for group in ("target", "control")
        }
        return counts | ({"benign": len(self.benign)} if self.benign else {})


def choose_settings(methods: str, quick: bool, seed: int, prompts: int | None = None) -> AuditSettings:
    """Return how much is measured. Raises UserError for fewer report prompts than any interval can be made of."""
    from obliteratus.audit.settings import DEFAULT, LEAST_PROMPTS, QUICK

    if prompts is not None and prompts < LEAST_PROMPTS:
        raise UserError(f"--prompts {prompts}: too few for an interval; give {LEAST_PROMPTS} or more")

    settings = QUICK if quick else DEFAULT
    names = split_names(methods)
    changes: dict[str, Any] = {"seed": seed} | ({"methods": names} if names else {})
    changes |= {} if prompts is None else {"prompts": prompts}
    return settings.model_copy(update=changes)


def parse_rewordings(given: Sequence[str] | None) -> dict[str, str]:
    """Return sources by name. Raises UserError for an entry that is no NAME=SRC, or a name given twice."""
    found: dict[str, str] = {}
    for entry in given or ():
        name, sign, source = entry.partition("=")
        if not sign or not name.strip() or not source.strip():
            raise UserError(f"--rewordings {entry}: give a name and a source, such as --rewordings french=french.txt")
        if name.strip() in found:
            raise UserError(f"--rewordings {entry}: the name {name.strip()} is given twice; give each file its own")
        found[name.strip()] = source.strip()
    return found


def run_request(request: Request, out: Path, resume: bool, clock: Clock) -> AuditReport:
    """Open the model, measure, and write the folder, which appears when it is complete."""
    from obliteratus.audit.firmness import run_audit
    from obliteratus.audit.firmness_page import write_audit
    from obliteratus.cli.jobs import open_at_kept_time
    from obliteratus.core.run_folder import Store, publish, workspace
    from obliteratus.verify.ladder import build_judge

    with workspace(out, request.identity, resume) as partial:
        with clock.time("SUMMON"):
            subject = open_at_kept_time(request.model, request.opening, partial)
        report = run_audit(
            subject,
            request.splits,
            request.settings,
            store=Store(partial, clock),
            judge=build_judge(request.judging, subject),
            benign=request.benign,
            own=request.rewordings,
            budget=request.budget,
        )
        with clock.time("REPORT"):
            write_audit(report, partial / "output", request.model, request.count_prompts(), request.sources)
        publish(partial, out)
    return report


def show_audit(report: AuditReport, out: Path, clock: Clock, json: bool) -> None:
    """Print the document, or the sentences."""
    from obliteratus.audit.claims import describe_headline
    from obliteratus.audit.firmness_page import PAGE, list_rows, to_dict
    from obliteratus.cli.stage_names import format_times
    from obliteratus.cli.terminal import say, show_json, show_table

    if json:
        show_json(to_dict(report))
        return
    if rows := list_rows(report):
        show_table(f"How firm {report.behavior} is", ["question", "finding"], rows)
    say(format_times(add_up_parts(clock.account())), "Time")
    say(f"{out}/{PAGE}", "Page")
    say(describe_headline(report), "Done")
    if not report.shows_behavior:
        say("Give prompts on which the model shows it, or another --behavior.", "Next")


def add_up_parts(seconds: Mapping[str, float]) -> dict[str, float]:
    """Return times in which all parts of the audit are one."""
    parts = {name: value for name, value in seconds.items() if name.startswith("AUDIT ")}
    others = {name: value for name, value in seconds.items() if name not in parts}
    return {**others, "AUDIT": sum(parts.values())}
