"""The command `inspect`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from obliteratus.options import Dtype, Json, Memory, Model, Quantise, Trust, shown

if TYPE_CHECKING:
    from obliteratus.planner import Forecast

# Prompts that a forecast is reckoned with where none are given: the organism's, some 250 of each group.
USUAL = "organism:astronomy"


def inspect(
    model: Model,
    dtype: Dtype = "auto",
    quantise: Quantise = "",
    trust_remote_code: Trust = False,
    memory: Memory = None,
    target: Annotated[str, typer.Option(help="Prompts that --memory reckons with.")] = USUAL,
    control: Annotated[str, typer.Option(help="Prompts that --memory reckons with.")] = USUAL,
    method: Annotated[str, typer.Option(help="The method that --memory reckons with.")] = "advanced",
    sites: Annotated[bool, typer.Option("--sites", help="List every site.")] = False,
    json: Json = False,
) -> None:
    """Sites, coverage, memory and time forecast; loads no weights, but with --memory a few blocks to measure."""
    from obliteratus.forecast import forecast, show
    from obliteratus.planner import plan_for
    from obliteratus.prompts import load_prompts
    from obliteratus.recipe import recipe
    from obliteratus.summon.memory import parsed
    from obliteratus.summon.outline import outline
    from obliteratus.terminal import show_json

    limit = parsed(memory) if memory else None
    opening: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code, "quantise": quantise}
    with shown(quiet=True):
        made = outline(model, **opening)
        data = forecast(made)
        plan = plan_for(made, limit, recipe(method), load_prompts(target, control), opening) if limit else None
    if json:
        show_json({**data, **({"plan": plan.told()} if plan else {})})
        return
    show(data, sites)
    if plan:
        _show(plan)


def _show(plan: Forecast) -> None:
    """The forecast under a limit as a table."""
    from obliteratus.terminal import results, size, table_of

    if not plan.stages:
        results.print(f"All weights fit into {size(plan.limit)}: {size(plan.needed)} are needed at least.")
        return
    rows = [[name, size(s.peak), size(s.read), f"{s.seconds:.0f} s"] for name, s in plan.stages.items()]
    title = f"Weights stay on disk under {size(plan.limit)}; {plan.prompts} prompts"
    results.print(table_of(title, ["stage", "peak memory", "weights read", "time"], rows))
