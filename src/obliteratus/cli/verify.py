"""The command verify: measure a model by itself or against its base."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from obliteratus.cli.options import (
    Behavior,
    Benign,
    Column,
    Control,
    Device,
    Dtype,
    Json,
    JudgedBy,
    JudgeModel,
    JudgeUrl,
    Keep,
    Model,
    NoOwnWords,
    Phrases,
    Quantize,
    Quiet,
    Seed,
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
)


def verify(
    model: Model,
    target: Target = None,
    control: Control = None,
    keep: Keep = None,
    benign: Benign = None,
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
    sources = collect_sources(column, target=target, control=control, keep=keep, benign=benign)
    opening = collect_opening(dtype, device, trust_remote_code, quantize, thinking, template)
    with show_progress(quiet, verbose) as clock:
        with start(clock):
            from obliteratus.cli.compare import Comparison, show_compared

            comparison = Comparison.create(choices, sources, seed, everything, out, split_by)
        found = comparison.run(model, against, opening, clock)
    show_compared(found, model, against, out, json)
