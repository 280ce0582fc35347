"""The rates that docs/runtimes.md forecasts from, measured on this machine and the organism; then the forecast's check.

    python -m bench.rates [--beside "what else ran"]

Writes docs/rates.json. The best of several runs counts for the machine, the median for the program.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.common import describe_machine, load_organism, say, time_call
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

REPEATS = 3
STEPS = 24  # of the answers that decoding is timed on
FEW, MANY = 32, 128  # rows of a step: two points give what a step costs by itself, and what a row adds
BATCH, ANSWER = 8, 16  # of the gradient step, as rdo takes them


def median_seconds(work: Callable[[], Any]) -> float:
    """Median seconds."""
    return median(time_call(work)[0] for _ in range(REPEATS))


def measure_bandwidth(megabytes: int = 400) -> float:
    """Bytes/s of matrix–vector products over a matrix that no cache holds, the best of ten."""
    width = 1024
    w, x = torch.randn(megabytes * 250_000 // width, width), torch.randn(width)
    return w.nbytes / min(time_call(lambda: torch.mv(w, x))[0] for _ in range(10))


def count_tokens(ids: Ids) -> int:
    """Tokens that pass: the shared prefix once."""
    prefix = common_prefix_length(ids)
    return sum(len(row) - prefix for row in ids) + prefix


def measure_token(subject: Subject, prompts: PromptSet) -> float:
    """Seconds a token of PROBE."""
    only = PromptSet({"control": prompts["control"][:256]})
    return median_seconds(lambda: collect_activations(subject, only, Probe(keep="moments"))) / count_tokens(
        render_prompts(subject, only["control"])
    )


def measure_head(subject: Subject) -> float:
    """Seconds a token of the LM head."""
    head, states = subject.model.get_output_embeddings(), torch.randn(128, subject.width)
    with torch.inference_mode():
        return min(time_call(lambda: head(states))[0] for _ in range(5)) / len(states)


def measure_decoding(subject: Subject, prompts: PromptSet) -> tuple[float, float]:
    """Seconds of a step by itself, and of each row in it. Only prompts whose answers are long enough are timed."""
    ids = render_prompts(subject, prompts["control"][: 2 * MANY])
    answers = generate(subject, ids, STEPS + 1)
    long = [row for row, answer in zip(ids, answers, strict=True) if len(answer) > STEPS]
    if len(long) < MANY:
        raise SystemExit(f"only {len(long)} answers of {STEPS} tokens; {MANY} are needed")

    def step(rows: Ids) -> float:
        whole, first = (median_seconds(partial(generate, subject, rows, n)) for n in (STEPS + 1, 1))
        return (whole - first) / STEPS

    few, many = step(long[:FEW]), step(long[:MANY])
    row = (many - few) / (MANY - FEW)
    return few - FEW * row, row


def measure_gradient(subject: Subject, prompts: PromptSet, token: float) -> float:
    """Seconds a token passed forward and back: a step of rdo, less its one batch without gradients."""
    pairs = [(row, [1] * ANSWER) for row in render_prompts(subject, prompts["control"][:BATCH])]
    unit = torch.nn.functional.normalize(torch.randn(subject.width), dim=0).requires_grad_(True)

    def step() -> None:
        for part in DirectionLosses(subject, MEASURED.layers // 2, 1.0).parts(unit, LossInputs(pairs, pairs, pairs)):
            part.backward()

    count = sum(len(prompt) + ANSWER for prompt, _ in pairs)
    return (median_seconds(step) - count * token) / (3 * count)


def check_forecast(subject: Subject, prompts: PromptSet, rates: Rates) -> dict[str, dict[str, float]]:
    """Each stage of `basic` as forecast, with the organism's own numbers, beside the seconds that it took."""
    made = load_recipe("basic")
    parts = dict(zip(("fit", "search", "report"), prompts.split(made.seed), strict=True))
    values: dict[str, int | float] = {"L": subject.n_layers, "N_texts": 16}
    for name, members in parts.items():
        values |= {f"N_{name},{group}": len(few) for group, few in members.groups.items()}
        values[f"N_{name}"] = sum(map(len, members.groups.values()))
    spent = run(made, subject, prompts)[1].seconds
    speed, result = extrapolate(rates, MEASURED), {}
    for stage, part, taken in (
        ("PROBE", "fit", spent["PROBE 1"]),
        ("VERIFY", "report", spent["VERIFY before"] + spent["VERIFY after"]),
    ):
        ids = [row for group in parts[part].groups.values() for row in render_prompts(subject, group)]
        own = sum(len(row) - common_prefix_length(ids) for row in ids) / len(ids)
        result[stage] = {"forecast": forecast_seconds(stage_costs(made)[stage], speed, values, own), "measured": taken}
    return result


def processor_name() -> str:
    """The machine's own name for itself."""
    lines = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return lines[0].partition(": ")[2] if lines else platform.processor()


def main() -> None:
    """Measure, check, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beside", default="nothing that was known of", help="what else ran on the machine")
    options = parser.parse_args()
    begun = time.perf_counter()
    subject, prompts = load_organism()
    say("PROBE …")
    token = measure_token(subject, prompts)
    say("decoding …")
    step, row = measure_decoding(subject, prompts)
    say("gradients …")
    gradient = measure_gradient(subject, prompts, token)
    say("the machine …")
    gemm = {shape.width: measure_gemm_rate(shape.width) for shape in SHAPES}
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
    rates = rates.model_copy(update={"check": check_forecast(subject, prompts, rates)})
    RATES.parent.mkdir(exist_ok=True)
    RATES.write_text(json.dumps(to_plain_data(rates), indent=1) + "\n")
    say(f"{RATES}: written after {time.perf_counter() - begun:.0f} s; now `make docs`")


if __name__ == "__main__":
    main()
