"""Measure the rates that docs/runtimes.md is computed from, on this machine and the organism, and check a forecast.

    python -m bench.rates [--beside "what else ran"] [--smoke]

Writes docs/rates.json; --smoke writes nothing. The best of several runs counts for the machine, the median for the
program.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from bench.common import (
    SMOKE_PROMPTS,
    SPLITS,
    describe_machine,
    load_organism,
    make_parser,
    say,
    take_prompts,
    time_call,
)
from bench.methods import shorten_steps
from bench.runtimes import MEASURED, RATES, SHAPES, Rates, extrapolate, forecast_seconds, to_plain_data
from obliteratus.causal.losses import DirectionLosses, LossInputs
from obliteratus.core.settings import Probe
from obliteratus.core.types import PromptSet, Subject
from obliteratus.forecast.formula import stage_costs
from obliteratus.forecast.machine import measure_gemm_rate
from obliteratus.inference.chat_template import Ids, render_prompts
from obliteratus.inference.generate import generate
from obliteratus.inference.shared_prefix import common_prefix_length
from obliteratus.pipeline.recipe import load_recipe
from obliteratus.pipeline.run import run
from obliteratus.probe.probe import collect_activations
from obliteratus.prompts import split_prompts


class Sizes(NamedTuple):
    """How much is timed."""

    repeats: int
    tokens: int
    """Tokens of the answers that decoding is timed on."""
    few: int
    many: int
    """Rows of a decoding step. Two points give the cost of a step by itself, and that of each row."""


WHOLE, SMOKE = Sizes(3, 24, 32, 128), Sizes(1, 2, 2, 6)
BATCH, ANSWER = 8, 16  # prompts and answer tokens of a gradient step, those of rdo


def median_seconds(work: Callable[[], Any], repeats: int) -> float:
    """Return the median seconds."""
    return median(time_call(work)[0] for _ in range(repeats))


def measure_bandwidth(megabytes: int = 400) -> float:
    """Return the bytes/s of matrix–vector products over a matrix larger than any cache, the best of ten."""
    width = 1024
    w, x = torch.randn(megabytes * 250_000 // width, width), torch.randn(width)
    return w.nbytes / min(time_call(lambda: torch.mv(w, x))[0] for _ in range(10))


def count_tokens(ids: Ids) -> int:
    """Return the tokens that are run, with the shared prefix counted once."""
    prefix = common_prefix_length(ids)
    return sum(len(row) - prefix for row in ids) + prefix


def measure_token(subject: Subject, prompts: PromptSet, sizes: Sizes) -> float:
    """Return the seconds of a token in PROBE."""
    controls = PromptSet({"control": prompts["control"][:256]})
    seconds = median_seconds(lambda: collect_activations(subject, controls, Probe(keep="moments")), sizes.repeats)
    return seconds / count_tokens(render_prompts(subject, controls["control"]))


def measure_head(subject: Subject) -> float:
    """Return the seconds of a token in the LM head."""
    head, states = subject.model.get_output_embeddings(), torch.randn(128, subject.width)
    with torch.inference_mode():
        return min(time_call(lambda: head(states))[0] for _ in range(5)) / len(states)


def measure_decoding(subject: Subject, prompts: PromptSet, sizes: Sizes) -> tuple[float, float]:
    """Return the seconds of a decoding step, and of each row in it, from prompts whose answers are long enough."""
    ids = render_prompts(subject, prompts["control"][: 2 * sizes.many])
    answers = generate(subject, ids, sizes.tokens + 1)
    long = [row for row, answer in zip(ids, answers, strict=True) if len(answer) > sizes.tokens]
    if len(long) < sizes.many:
        raise SystemExit(f"only {len(long)} answers have {sizes.tokens} tokens; {sizes.many} are needed")

    def step(rows: Ids) -> float:
        calls = (partial(generate, subject, rows, n) for n in (sizes.tokens + 1, 1))
        whole, first = (median_seconds(call, sizes.repeats) for call in calls)
        return (whole - first) / sizes.tokens

    few, many = step(long[: sizes.few]), step(long[: sizes.many])
    row = (many - few) / (sizes.many - sizes.few)
    return few - sizes.few * row, row


def measure_gradient(subject: Subject, prompts: PromptSet, token: float, sizes: Sizes) -> float:
    """Return the seconds of a token forward and backward: a step of rdo without its one batch without gradients."""
    pairs = [(row, [1] * ANSWER) for row in render_prompts(subject, prompts["control"][:BATCH])]
    unit = torch.nn.functional.normalize(torch.randn(subject.width), dim=0).requires_grad_(True)

    def step() -> None:
        for part in DirectionLosses(subject, MEASURED.layers // 2, 1.0).parts(unit, LossInputs(pairs, pairs, pairs)):
            part.backward()

    count = sum(len(prompt) + ANSWER for prompt, _ in pairs)
    return (median_seconds(step, sizes.repeats) - count * token) / (3 * count)


def check_forecast(
    subject: Subject, prompts: PromptSet, rates: Rates, overrides: dict[str, Any]
) -> dict[str, dict[str, float]]:
    """Return for each stage of `basic` the seconds forecast for the organism's prompts, and those that it took."""
    recipe = load_recipe("basic", overrides)
    parts = dict(zip(SPLITS, split_prompts(prompts, recipe.seed), strict=True))
    values: dict[str, int | float] = {"L": subject.n_layers, "N_texts": 16}
    for name, members in parts.items():
        values |= {f"N_{name},{group}": len(few) for group, few in members.groups.items()}
        values[f"N_{name}"] = sum(map(len, members.groups.values()))
    spent = run(recipe, subject, prompts, force=True).run.seconds
    speed, result = extrapolate(rates, MEASURED), {}
    for stage, part, taken in (
        ("PROBE", "fit", spent["PROBE 1"]),
        ("VERIFY", "report", spent["VERIFY before"] + spent["VERIFY after"]),
    ):
        ids = [row for group in parts[part].groups.values() for row in render_prompts(subject, group)]
        own = sum(len(row) - common_prefix_length(ids) for row in ids) / len(ids)
        result[stage] = {
            "forecast": forecast_seconds(stage_costs(recipe)[stage], speed, values, own),
            "measured": taken,
        }
    return result


def processor_name() -> str:
    """Return the name of the processor."""
    lines = [
        line for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if line.startswith("model name")
    ]
    return lines[0].partition(": ")[2] if lines else platform.processor()


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the rates, check the forecast, and write the file."""
    parser = make_parser(__doc__)
    parser.add_argument("--beside", default="nothing known", help="what else ran on the machine")
    options = parser.parse_args(argv)
    sizes, start = SMOKE if options.smoke else WHOLE, time.perf_counter()
    subject, prompts = load_organism()
    prompts = take_prompts(prompts, SMOKE_PROMPTS) if options.smoke else prompts
    say("PROBE …")
    token = measure_token(subject, prompts, sizes)
    say("decoding …")
    step, row = measure_decoding(subject, prompts, sizes)
    say("gradients …")
    gradient = measure_gradient(subject, prompts, token, sizes)
    say("the machine …")
    gemm = {shape.width: measure_gemm_rate(shape.width) for shape in SHAPES[: 1 if options.smoke else None]}
    rates = Rates(
        date=f"{datetime.now(UTC):%Y-%m-%d}",
        machine=f"{processor_name()}, {describe_machine()}",
        beside=options.beside,
        gemm=gemm,
        bandwidth=measure_bandwidth(),
        token=token,
        head=measure_head(subject),
        step=step,
        row=row,
        gradient=gradient,
        check={},
    )
    say("the check …")
    rates = rates.model_copy(
        update={"check": check_forecast(subject, prompts, rates, shorten_steps(False, options.smoke))}
    )
    text = json.dumps(to_plain_data(rates), indent=1) + "\n"
    if options.smoke:
        print(text)
        return
    RATES.write_text(text, encoding="utf-8")
    say(f"{RATES}: written after {time.perf_counter() - start:.0f} s; now `make docs`")


if __name__ == "__main__":
    main()
