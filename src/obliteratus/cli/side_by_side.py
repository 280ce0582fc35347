"""The command compare: runs and models on the same prompts, on one page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from obliteratus.cli.options import (
    Behavior,
    Control,
    Device,
    Dtype,
    Json,
    Keep,
    Out,
    Quiet,
    Seed,
    Target,
    Trust,
    Verbose,
    show_progress,
    start,
)
from obliteratus.core.errors import UserError

if TYPE_CHECKING:
    from obliteratus.compare.differences import SharesOfSides
    from obliteratus.compare.sides import SideAnswers
    from obliteratus.core.types import PromptSet, Subject
    from obliteratus.judge.judge import Judge

MAX_SIDES = 6  # colors that people tell apart on the page


def compare(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="A B...", help="Output folders of runs, and models: folders, hub ids, organism:NAME."),
    ],
    target: Target = None,
    control: Control = None,
    keep: Keep = None,
    behavior: Behavior = None,
    seed: Seed = None,
    out: Out = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: Trust = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Compare runs and models on the same held-out prompts, with paired differences and all answers on one page.

    Runs bring their answers along. Models answer the prompts of the first run, or those of --target and --control.
    """
    opening = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    with show_progress(quiet, verbose) as clock:
        with start(clock):
            from obliteratus.compare.differences import compare_sides
            from obliteratus.compare.page import render_comparison
            from obliteratus.core.run_folder import check_free, write_atomic

            check_sources(sources, target or control or keep, behavior)
            if out is not None:
                check_free(out)
        with clock.time("VERIFY"):
            groups = {"target": target, "control": control, "keep": keep}
            sides = collect_sides(sources, groups, behavior, seed, opening)
    shares = compare_sides(sides)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(out / "index.html", render_comparison(sides, shares))
    show_comparison_of_sides(sides, shares, out, json)


def check_sources(sources: Sequence[str], prompts: str | None, behavior: str | None) -> None:
    """Raise UserError, before any model is opened, for sides that cannot be compared."""
    from obliteratus.compare.sides import is_run

    if not 1 < len(sources) <= MAX_SIDES:
        raise UserError(f"compare: {len(sources)} given; give two to {MAX_SIDES} runs or models")
    if twice := [s for s in sources if sources.count(s) > 1]:
        raise UserError(f"compare: {twice[0]} is given twice; give each once")
    runs = [s for s in sources if is_run(s)]
    if len(runs) == len(sources) and (prompts or behavior):
        raise UserError(
            "compare: runs have their own prompts and verdicts; leave --target, --control and --behavior out"
        )


def name_sources(sources: Sequence[str]) -> list[str]:
    """Return short names, the last part of a path where these differ."""
    short = [source.rstrip("/").rpartition("/")[2] for source in sources]
    return short if len(set(short)) == len(short) else [f"{name} ({i})" for i, name in enumerate(short, 1)]


def collect_sides(
    sources: Sequence[str], groups: dict[str, Any], behavior: str | None, seed: int | None, opening: dict[str, Any]
) -> list[SideAnswers]:
    """Return all sides on the prompts that they have in common, the unedited model of the runs first."""
    from obliteratus.compare.sides import find_judge, is_run, keep_common, read_side, to_prompts, unedited_side
    from obliteratus.core.settings import JudgeSettings

    named = dict(zip(sources, name_sources(sources), strict=True))
    runs = {source: read_side(source, name) for source, name in named.items() if is_run(source)}
    prompts = to_prompts(next(iter(runs.values()))) if runs and not groups["target"] else None
    settings = find_judge(next(iter(runs))) if runs else JudgeSettings()
    if behavior is not None:
        settings = settings.model_copy(update={"behavior": behavior})
    asked = prompts or (None if len(runs) == len(sources) else load_asked(groups, settings, seed))
    sides = [
        runs[source] if source in runs else open_side(source, name, asked, settings, opening)
        for source, name in named.items()
    ]
    unedited = unedited_side(list(runs))
    return keep_common([unedited, *sides] if unedited else sides)


def load_asked(groups: dict[str, Any], settings: Any, seed: int | None) -> PromptSet:
    """Return the report prompts of the given files, or of the behavior's own."""
    from obliteratus.cli.jobs import load_with_examples
    from obliteratus.prompts import split_prompts

    return split_prompts(load_with_examples(groups, settings), seed or 0).report


def open_side(source: str, name: str, prompts: Any, settings: Any, opening: dict[str, Any]) -> SideAnswers:
    """Return a model's answers to the prompts. It is freed afterwards."""
    from obliteratus.compare.sides import measure_side
    from obliteratus.summon.load import open_subject
    from obliteratus.verify.ladder import build_judge

    subject: Subject = open_subject(source, **opening)
    judge: Judge = build_judge(settings, subject)
    return measure_side(subject, name, prompts, judge)


def show_comparison_of_sides(
    sides: Sequence[SideAnswers], shares: Sequence[SharesOfSides], out: Path | None, json: bool
) -> None:
    """Print the sentence and the table, or one JSON document."""
    from obliteratus.cli.terminal import say, show_json, show_table
    from obliteratus.compare.differences import describe_comparison
    from obliteratus.compare.page import list_shares

    if json:
        show_json(
            {
                "sides": [side.name for side in sides],
                "shares": {s.name: [r.model_dump(mode="json") for r in s.rates] for s in shares},
                "differences": {s.name: [c.model_dump(mode="json") for c in s.changes] for s in shares},
            }
        )
        return
    show_table("Shares of answers, 95 % intervals", *list_shares(sides, shares))
    if out:
        say(f"{out}/index.html", "Page")
    say(describe_comparison(sides, shares), "Done")
    say(f"open {out}/index.html: all answers." if out else "--out FOLDER writes a page with all answers.", "Next")
