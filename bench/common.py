"""What benchmarks share: options, the model and its prompts, fair timing, the FLOP floor, and output."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch

from obliteratus.core.types import PromptSet, Subject
from obliteratus.forecast.machine import measure_gemm_rate
from obliteratus.inference.chat_template import Ids
from obliteratus.inference.shared_prefix import common_prefix_length
from obliteratus.prompts import load_prompts
from obliteratus.summon.load import open_subject

SPLITS = ("fit", "search", "report")
SMOKE_PROMPTS = 8  # of each split and group with --smoke


def make_parser(about: str | None, quick: str = "") -> argparse.ArgumentParser:
    """Return a parser with --quick (if it is described), --smoke and --json."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    if quick:
        parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--smoke", action="store_true", help="smallest sizes: shows that it runs, measures nothing")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    return parser


def parse_options(about: str | None, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse --quick, --smoke, --json and --repeats. --smoke implies --quick and one repeat."""
    parser = make_parser(about, "take at most 50 s: measure slow contestants on a sample")
    parser.add_argument("--repeats", type=int, default=3, help="repeats of fast contestants; the median counts")
    options = parser.parse_args(argv)
    if options.smoke:
        options.quick, options.repeats = True, 1
    return options


@cache
def open_organism(name: str = "astronomy") -> Subject:
    """Return a model organism in fp32, loaded once."""
    return open_subject(f"organism:{name}")


def load_organism() -> tuple[Subject, PromptSet]:
    """Return the astronomy organism and its prompts."""
    return open_organism(), load_prompts("organism:astronomy", "organism:astronomy")


def take_prompts(prompts: PromptSet, n: int) -> PromptSet:
    """Return the first n prompts of each split of each group."""
    return PromptSet(
        {
            group: tuple(p for split in SPLITS for p in [m for m in members if m.split == split][:n])
            for group, members in prompts.groups.items()
        }
    )


def time_call(run: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds of a call and its result."""
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def time_sample(run: Callable[[Ids], Any], ids: Ids, every: int) -> tuple[float, Any]:
    """Run on every n-th row, and return the seconds scaled to all rows, and the result.

    This is fair to those that take each prompt or batch by itself.
    """
    sample = ids[::every]
    seconds, result = time_call(lambda: run(sample))
    return seconds * len(ids) / len(sample), result


def time_in_turns(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Return the median seconds of each, run in turns so that a busy minute affects all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            say(f"{name} …")
            seconds[name].append(time_call(run)[0])
    return {name: median(values) for name, values in seconds.items()}


def compute_ratios(seconds: dict[str, float]) -> dict[str, float]:
    """Return others' seconds over ours, and ours over the floor."""
    ours = seconds["ours"]
    theirs = {name: value / ours for name, value in seconds.items() if name not in ("ours", "floor")}
    return theirs | {"floor": ours / seconds["floor"]}


def count_backbone_flops(subject: Subject, ids: Ids) -> float:
    """Return the least FLOPs of all blocks: 2 for each weight and token, with the shared prefix counted once."""
    blocks = subject.module(subject.layers)
    weights = sum(p.numel() for p in blocks.parameters() if p.ndim == 2)
    prefix = common_prefix_length(ids)
    return 2.0 * weights * (sum(len(row) - prefix for row in ids) + prefix)


def count_head_flops(subject: Subject, tokens: int) -> float:
    """Return the FLOPs of the LM head on this number of positions."""
    return 2.0 * float(subject.model.get_output_embeddings().weight.numel()) * tokens


def measure_machine_rate(repeats: int = 3) -> float:
    """Return the FLOP/s of large fp32 matrix products. The best run counts, since the floor must not be too high."""
    return max(measure_gemm_rate() for _ in range(repeats))


def resident_bytes() -> int:
    """Return the bytes that this process holds in memory."""
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * 4096


def run_with_peak(run: Callable[[], Any]) -> tuple[int, int, Any]:
    """Return the resident bytes before a run, the peak during it, and its result. Linux only."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets the high-water mark
    before = resident_bytes()
    result = run()
    return before, peak_bytes(), result


def in_fresh_process(run: Callable[..., Any], *arguments: Any) -> Any:
    """Return the result of a function that is called in a new process, which shares no memory with this one."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(run, *arguments).result()


def peak_bytes() -> int:
    """Return the most bytes held since the high-water mark was reset. Linux only."""
    status = Path("/proc/self/status").read_text(encoding="utf-8").split()
    return int(status[status.index("VmHWM:") + 1]) * 1024


def describe_memory(before: int, peak: int, kept: float) -> dict[str, float]:
    """Return the peak over the loaded process plus the activations that must be kept, and the three in MB."""
    megabytes = {"loaded_MB": before / 1e6, "kept_MB": kept / 1e6, "peak_MB": peak / 1e6}
    return {"peak_over_loaded": peak / (before + kept), **megabytes}


def say(text: str) -> None:
    """Print progress to stderr."""
    print(text, file=sys.stderr, flush=True)


def print_report(result: dict[str, Any], as_json: bool) -> None:
    """Print the result as JSON or as a list."""
    if as_json:
        print(json.dumps(result, indent=1))
        return
    for section, values in result.items():
        print(section)
        for name, value in values.items() if isinstance(values, dict) else [("", values)]:
            print(f"  {name:<18} {value:.3f}" if isinstance(value, float) else f"  {name:<18} {value}")


def format_rows(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [columns, ["---"] * len(columns), *rows])


def describe_machine() -> str:
    """Return what the benchmark ran on."""
    return f"torch {torch.__version__}, {torch.get_num_threads()} threads, CPU fp32"
