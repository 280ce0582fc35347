"""What every bench shares: the model, the prompts, the floor, and fair timing."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
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


def arguments(about: str) -> argparse.Namespace:
    """--quick, --json, --repeats."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--quick", action="store_true", help="within 50 s: the slow contestants on a sample")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--repeats", type=int, default=3, help="of the fast contestants; the median counts")
    return parser.parse_args()


def organism() -> tuple[Subject, PromptSet]:
    """The model organism in fp32 and its prompts."""
    return open_subject("organism:astronomy"), load_prompts("organism:astronomy", "organism:astronomy")


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds and result."""
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def scaled(run: Callable[[Ids], Any], ids: Ids, every: int) -> tuple[float, Any]:
    """Seconds for all rows, from a run over every so-many-th one, and that run's result.

    Fair for those that take each prompt or batch by itself; ``every`` = 1 measures all.
    """
    sample = ids[::every]
    seconds, result = timed(lambda: run(sample))
    return seconds * len(ids) / len(sample), result


def interleaved(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each, taken in turns so that a noisy minute hits all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            say(f"{name} …")
            seconds[name].append(timed(run)[0])
    return {name: median(values) for name, values in seconds.items()}


def ratios(seconds: dict[str, float]) -> dict[str, float]:
    """Theirs over ours; ours over the floor."""
    ours = seconds["ours"]
    theirs = {name: value / ours for name, value in seconds.items() if name not in ("ours", "floor")}
    return theirs | {"floor": ours / seconds["floor"]}


def backbone_flops(subject: Subject, ids: Ids) -> float:
    """FLOPs of the tokens that differ: 2 for each weight of each block's matrices; the shared prefix once."""
    blocks = subject.module(subject.layers)
    weights = sum(p.numel() for p in blocks.parameters() if p.ndim == 2)
    prefix = common_prefix_length(ids)
    return 2.0 * weights * (sum(len(row) - prefix for row in ids) + prefix)


def head_flops(subject: Subject, tokens: int) -> float:
    """FLOPs of the LM head on so many positions."""
    return 2.0 * float(subject.model.get_output_embeddings().weight.numel()) * tokens


def machine_rate(repeats: int = 3) -> float:
    """FLOP/s of large fp32 matrix products, the best seen: a floor must not be too high."""
    return max(measure_gemm_rate() for _ in range(repeats))


def resident() -> int:
    """Resident bytes now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def with_peak(run: Callable[[], Any]) -> tuple[int, int, Any]:
    """Resident bytes before a run, the peak during it, and its result. Linux only."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = resident()
    result = run()
    status = Path("/proc/self/status").read_text().split()
    return before, int(status[status.index("VmHWM:") + 1]) * 1024, result


def memory(before: int, peak: int, kept: float) -> dict[str, float]:
    """The peak over the loaded process plus the activations that must be kept, and the three in MB."""
    megabytes = {"loaded_MB": before / 1e6, "kept_MB": kept / 1e6, "peak_MB": peak / 1e6}
    return {"peak_over_loaded": peak / (before + kept), **megabytes}


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def report(result: dict[str, Any], as_json: bool) -> None:
    """The document, or a list for people."""
    if as_json:
        print(json.dumps(result, indent=1))
        return
    for section, values in result.items():
        print(section)
        for name, value in values.items() if isinstance(values, dict) else [("", values)]:
            print(f"  {name:<18} {value:.3f}" if isinstance(value, float) else f"  {name:<18} {value}")


def machine() -> str:
    """What ran it."""
    return f"torch {torch.__version__}, {torch.get_num_threads()} threads, CPU fp32"
