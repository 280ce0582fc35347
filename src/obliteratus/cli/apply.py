"""The command apply: bake a saved plan into the model it was made for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from obliteratus.cli.options import (
    Base,
    Device,
    Dtype,
    Json,
    Model,
    Quantize,
    Quiet,
    Save,
    Template,
    Thinking,
    Trust,
    Verbose,
    collect_opening,
    show_progress,
    start,
)


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
    opening = collect_opening(dtype, device, trust_remote_code, quantize, thinking, template)
    with show_progress(quiet, verbose) as clock:
        with start(clock):
            from obliteratus.cli.apply_plan import apply_plan, show_applied
        saved = apply_plan(plan, model, out, save, opening, clock, base)
    show_applied(saved, out, json)
