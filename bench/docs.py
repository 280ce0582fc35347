"""The pages that are made, not written: docs/methods.md from the recipes, docs/runtimes.md from docs/rates.json, and
docs/architectures.md from the architecture table.

    python -m bench.docs

tests/test_docs.py fails where a page is stale.
"""

from __future__ import annotations

from bench.architectures import make_architectures_page
from bench.common import say
from bench.runtimes import (
    BYTES,
    MEASURED,
    RATES,
    SHAPES,
    Rates,
    Shape,
    extrapolate,
    forecast_seconds,
    format_seconds,
    load_rates,
)
from obliteratus.cli.terminal import format_bytes
from obliteratus.core.settings import Recipe
from obliteratus.forecast.formula import (
    CLASSES,
    COLUMNS,
    OWN,
    REFERENCE,
    SHARED,
    TEXT,
    format_formula,
    relative_effort,
    stage_costs,
    table_row,
    total_cost,
)
from obliteratus.pipeline.recipe import list_methods, load_recipe

FOLDER = RATES.parent
GENERATED = "<!-- Made by `make docs`; do not edit. -->"
LEGEND = """\
`N_fit`, `N_search`, `N_report` are the prompts of the three parts, all groups together, or of the group that is
named; `N_texts` the paragraphs that perplexity is taken on; L layers of width H. A *forward* passes a prompt once;
*× 48 tokens* answers it with as many, which passes it too (the first token's KL is taken from that pass); a *gradient
step* passes its prompts forward and back. `≤` stands where a run may end earlier: a later pass that is not needed is
left out, and gradient steps stop when they stand still. Answers end early as well, at a refusal or their end token."""


def make_table(columns: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [columns, ["---"] * len(columns), *rows])


def make_methods_page(made: list[Recipe]) -> str:
    """docs/methods.md."""
    low, moderate = CLASSES.values()
    rows = [[*table_row(one), f"{relative_effort(one):.2f}", format_formula(one)] for one in made]
    return f"""{GENERATED}
# The methods

{make_table([*COLUMNS, "work", "formula"], rows)}

{LEGEND}

*Work* is in tokens that pass through the model, over those of one PROBE and the two VERIFYs, which every run needs:
{low:g} or less is `low`, up to {moderate:g} `moderate`, more `high`. A token with gradients counts twice. Reckoned with
{_reference()}.

*Memory* is what is held beside the model: `means` O(L·H), running sums; `rows` O(N_fit·L·H), every prompt's stream;
`sketch` O(64·L·H), how each group spreads (`--set probe.keep=sketch`, for methods whose steps are svd, whitened_svd,
discriminant or leace); `gradients` O(prompts·tokens·L·H) of a step, for the way back.

`obliteratus methods NAME` prints a recipe with its formula; `obliteratus methods --json` has that of each stage.
"""


def _reference() -> str:
    n = REFERENCE
    groups = f"{n['N_fit']} fit, {n['N_search']} search and {n['N_report']} report prompts"
    return f"{groups} of {OWN} tokens beyond a shared prefix of {SHARED}, and {n['N_texts']} texts of {TEXT} tokens"


# ----------------------------------------------------------------------------------------- runtimes
def make_runtimes_page(made: list[Recipe], rates: Rates) -> str:
    """docs/runtimes.md."""
    return f"""{GENERATED}
# How long the methods take

Forecasts for one machine ({rates.machine}), weights in fp32.
They follow from the [formulas](methods.md), from
{_reference()},
and from the rates below. They count every pass, answer token and gradient step that a run may take, so most runs end
sooner; searches are forecast as if every trial answered every search prompt. Nothing above {MEASURED.name} was run:
those columns are extrapolated, and suppose that the weights fit into memory. Arithmetic over tensors is left out.

{_forecasts(made, rates)}

## Rates
Measured on {rates.date} by `python -m bench.rates`; beside it ran: {rates.beside}.
Rates of {MEASURED.name} are measured on {MEASURED.like}. The others are extrapolated from FLOPs (at the measured matrix
rate of their width, of which {MEASURED.name} reaches a measured share) or from bytes (weights read once a step at the
measured bandwidth, and what a step of {MEASURED.name} takes beside reading, by layer).

{_rates(rates)}

Bandwidth: {rates.bandwidth / 1e9:.1f} GB/s, measured: a matrix–vector product over 400 MB.

## Memory
Computed from sizes, fp32: not measured.

{_memory()}

## The form of the forecast, checked
{_check(rates)}
"""


def _forecasts(made: list[Recipe], rates: Rates) -> str:
    heads = [f"{s.name}: {_kind(s, 'FLOPs and bytes', 'from measured rates')}" for s in SHAPES]
    rows = [[one.name, *[format_seconds(_seconds(one, shape, rates)) for shape in SHAPES]] for one in made]
    parts = [
        [f"of these, {name} of `basic`", *(format_seconds(_stage(name, shape, rates)) for shape in SHAPES)]
        for name in ("PROBE", "VERIFY")
    ]
    return make_table(["method", *heads], rows + parts)


def _seconds(made: Recipe, shape: Shape, rates: Rates) -> float:
    return forecast_seconds(total_cost(made), extrapolate(rates, shape), {**REFERENCE, "L": shape.layers})


def _stage(name: str, shape: Shape, rates: Rates) -> float:
    return forecast_seconds(
        stage_costs(load_recipe("basic"))[name], extrapolate(rates, shape), {**REFERENCE, "L": shape.layers}
    )


def _kind(shape: Shape, basis: str, measured: str = "measured") -> str:
    return measured if shape == MEASURED else f"extrapolated from {basis}"


RATE_NAMES = {
    "token": ("a token passed in PROBE", "FLOPs"),
    "head": ("LM head on a token", "FLOPs"),
    "step": ("a decoding step by itself", "bytes"),
    "row": ("a row more in a step", "FLOPs"),
    "gradient": ("a token forward and back", "FLOPs"),
}


def _rates(rates: Rates) -> str:
    speeds = {shape: extrapolate(rates, shape) for shape in SHAPES}
    rows = [
        [title, *(f"{_small(speeds[shape][name])}, {_kind(shape, basis)}" for shape in SHAPES)]
        for name, (title, basis) in RATE_NAMES.items()
    ]
    gemm = ["matrix rate at its width", *(f"{rates.gemm[s.width] / 1e9:.0f} GFLOP/s, measured" for s in SHAPES)]
    return make_table(["", *(f"{s.name} ({s.like})" for s in SHAPES)], [gemm, *rows])


def _small(value: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= scale or unit == "µs":
            return f"{value / scale:.3g} {unit}"
    raise AssertionError


def _memory() -> str:
    n, report = REFERENCE["N_fit"], REFERENCE["N_report"]
    rows = [
        ["weights", *(format_bytes(s.weights) for s in SHAPES)],
        ["`means` of two groups", *(format_bytes(BYTES * 2 * (s.layers + 1) * s.width) for s in SHAPES)],
        [f"`rows` of {n} prompts", *(format_bytes(BYTES * n * (s.layers + 1) * s.width) for s in SHAPES)],
        [
            f"keys and values of {report} answers of 48 tokens",
            *(format_bytes(BYTES * report * (SHARED + OWN + 48) * 2 * s.layers * s.keys) for s in SHAPES),
        ],
    ]
    return make_table(["", *(s.name for s in SHAPES)], rows)


def _check(rates: Rates) -> str:
    rows = [
        [
            stage,
            format_seconds(found["forecast"]),
            format_seconds(found["measured"]),
            f"{found['forecast'] / found['measured']:.2f}",
        ]
        for stage, found in rates.check.items()
    ]
    note = "`basic` on the organism (its own numbers of prompts and tokens), in the session that measured the rates.\n"
    note += "VERIFY is forecast as if no answer ended early; refusals do."
    return f"{note}\n\n{make_table(['stage', 'forecast', 'measured', 'forecast over measured'], rows)}"


def make_pages() -> dict[str, str]:
    """All pages by file name."""
    made = [load_recipe(name) for name in list_methods()]
    return {
        "methods.md": make_methods_page(made),
        "runtimes.md": make_runtimes_page(made, load_rates()),
        "architectures.md": make_architectures_page(GENERATED),
    }


def main() -> None:
    """Write them."""
    for name, text in make_pages().items():
        (FOLDER / name).write_text(text)
        say(f"{FOLDER / name}: written")


if __name__ == "__main__":
    main()
