"""Define the command `inspect`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from obliteratus.cli.options import Dtype, Json, Memory, Model, Plugin, Quantize, Trust, show_progress, start
from obliteratus.core.errors import UserError

# A forecast without prompts is made for those of the organism, about 250 of each group.
DEFAULT_PROMPTS = "organism:astronomy"


def inspect(
    model: Model,
    dtype: Dtype = "auto",
    quantize: Quantize = "",
    trust_remote_code: Trust = False,
    memory: Memory = None,
    target: Annotated[str | None, typer.Option(help="Target prompts for the forecast of --memory.")] = None,
    control: Annotated[str | None, typer.Option(help="Control prompts for the forecast of --memory.")] = None,
    method: Annotated[str | None, typer.Option(help="Method for the forecast of --memory (advanced).")] = None,
    plugin: Plugin = None,
    sites: Annotated[bool, typer.Option("--sites", help="List every site.")] = False,
    json: Json = False,
) -> None:
    """Show sites, coverage, and a forecast of memory and time. Only --memory loads a few blocks, to time them."""
    from obliteratus.cli.terminal import show_json
    from obliteratus.core.choices import parse_size
    from obliteratus.forecast.machine import forecast_model
    from obliteratus.forecast.offloaded import forecast_run
    from obliteratus.pipeline.recipe import load_recipe
    from obliteratus.prompts import load_prompts
    from obliteratus.summon.summary import summarize_model

    if not memory and (target or control or method or plugin):
        raise UserError("--target, --control, --method and --plugin: only a forecast uses them; add --memory SIZE")
    limit = parse_size(memory) if memory else None
    opening: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code, "quantize": quantize}
    with show_progress(quiet=True) as clock, start(clock, plugins=plugin):
        summary = summarize_model(model, **opening)
        data = forecast_model(summary)
        plan = None
        if limit:
            prompts = load_prompts(target or DEFAULT_PROMPTS, control or DEFAULT_PROMPTS)
            plan = forecast_run(summary, limit, load_recipe(method or "advanced"), prompts, opening)
    if json:
        show_json({**data, **({"plan": plan} if plan else {})})
        return
    show(data, sites)
    if plan:
        show_plan(plan)


def show_plan(plan: dict[str, Any]) -> None:
    """Print the forecast of a run under a memory limit."""
    from obliteratus.cli.terminal import format_bytes, say, show_table

    if not plan["stages"]:
        needed = format_bytes(plan["needed_in_memory"])
        say(f"All weights fit into {format_bytes(plan['limit'])}; the run needs at least {needed}.")
        return
    rows = [
        [name, format_bytes(s["peak"]), format_bytes(s["read"]), f"{s['seconds']:.0f} s"]
        for name, s in plan["stages"].items()
    ]
    title = f"Weights stay on disk under {format_bytes(plan['limit'])}; {plan['prompts']} prompts"
    show_table(title, ["stage", "peak memory", "weights read", "time"], rows)


def _kind(data: dict[str, Any]) -> str:
    """Return how the weights are held in memory."""
    dtype, stored = data["memory"]["dtype"], data["quantization"]
    if not stored:
        return f"in {dtype}"
    return f"as {stored}, the rest in {dtype}" if data["packed"] else f"in {dtype}, from {stored}"


def show(data: dict[str, Any], sites: bool) -> None:
    """Print the summary of a model and its forecast."""
    from obliteratus.cli.terminal import format_bytes, results, say, show_table
    from obliteratus.forecast.machine import PROMPTS, TOKENS
    from obliteratus.summon.coverage import coverage_warning

    memory, cover, clock = data["memory"], data["coverage"], data["time"]
    rows = [
        ["architecture", f"{data['model_type']}, {data['n_layers']} layers of width {data['width']}"],
        ["parameters", f"{data['parameters']:,}" + (" (tied embeddings)" if data["tied_embeddings"] else "")],
        ["sites", ", ".join(f"{part} {n}" for part, n in data["parts"].items())],
        [
            "writers found",
            f"{cover['share']:.1%} of the writing parameters; {len(cover['paths'])} unclaimed matrices",
        ],
        ["weights", f"{format_bytes(memory['weights'])} {_kind(data)}; {format_bytes(memory['free'])} free here"],
        [
            "activations",
            f"{format_bytes(memory['activations_kept'])} for {PROMPTS} + {PROMPTS} prompts kept one by one",
        ],
        ["key-value cache", f"{format_bytes(memory['cache_per_token'])} a token"],
        [
            "PROBE",
            f"≥ {clock['probe_floor_seconds']:.1f} s for {PROMPTS} prompts of {TOKENS} own tokens, at the "
            f"{clock['gemm_flops'] / 1e9:.0f} GFLOP/s just measured here (CPU, fp32)",
        ],
    ]
    show_table(data["source"], ["what", "value"], rows)
    if short := coverage_warning(cover["share"], len(cover["paths"])):
        say(short, "Warning")
    for path in cover["paths"]:
        say(f"{path}: not in the architecture table, so it is never edited", "Warning")
    if sites:
        for site in data["sites"]:  # one per line and tab-separated, for grep and cut
            norm = f"through {site['gain']}" if site["gain"] else "no norm"
            results.out("\t".join([site["path"], site["part"], site["role"], site["layout"], norm]))
