"""Probe, edit, verify and save a checkpoint that is larger than the memory allowed, and compare with one that fits.

Both checkpoints have random weights (`bench.synthetic`). The large one runs under a limit that the system enforces: a
memory cgroup if one can be made, else RLIMIT_AS. It is dropped from the file cache before each stage, so that a stage
reads it from disk. The small one runs with its weights in memory and on disk, in turns, with its files in the cache.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from bench.common import describe_machine, parse_options, print_report, say
from bench.synthetic import write_checkpoint

PLACE = Path(tempfile.gettempdir()) / "obliteratus-bench"
# Gigabytes. The large checkpoint has over three times its limit. The program's own budget is below the limit, which
# leaves room for page tables and for what the file cache cannot give back at once.
LIMIT, BUDGET = 1.3, 1.2


class Size(NamedTuple):
    """Checkpoints in gigabytes with their widths, and prompts of each group."""

    large: float
    large_width: int
    small: float
    small_width: int
    prompts: int


WHOLE = Size(5.4, 1536, 1.5, 1024, 32)
# --quick does not reach three times the limit, which cannot be below what Python, torch and two blocks take.
QUICK = Size(1.5, 1536, 1.5, 1024, 6)
SMOKE = Size(0.15, 256, 0.1, 256, 2)
CGROUPS = Path("/sys/fs/cgroup/memory")
ON_DISK = ["--memory", str(BUDGET * 1e9)]
STAGES = ("PROBE", "VERIFY", "SAVE", "SCORE live", "SCORE saved")


def main(argv: Sequence[str] | None = None) -> None:
    """Print seconds, ratios, memory, and by how much results differ."""
    options = parse_options(__doc__, argv)
    sizes = SMOKE if options.smoke else QUICK if options.quick else WHOLE
    prompts = sizes.prompts
    large_folder = write_checkpoint(PLACE / f"large-{sizes.large}", sizes.large, sizes.large_width)
    large, large_expected = _run_large(large_folder, prompts)
    small = write_checkpoint(PLACE / f"small-{sizes.small}", sizes.small, sizes.small_width)
    small_expected = _run_child(small, [*ON_DISK, "--forecast", "--prompts", str(prompts)])
    loaded, on_disk = _run_in_turns(small, prompts, 1 if options.quick else options.repeats)
    size = sum(file.stat().st_size for file in large_folder.glob("*.safetensors"))
    throughput = {
        f"throughput {stage}": _median_seconds(loaded, stage) / _median_seconds(on_disk, stage) for stage in STAGES[:2]
    }
    read = {stage: large["stages"][stage]["read"] / size for stage in STAGES}
    print_report(
        {
            "seconds": {stage: large["stages"][stage]["seconds"] for stage in STAGES},
            "ratio": {
                "peak_over_limit": large["peak"] / (LIMIT * 1e9),
                "bytes_read": max(read.values()),
                "checkpoint_over_limit": size / (LIMIT * 1e9),
                **throughput,
            },
            "read": read,
            "forecast_over_measured": {
                "large": _compare_forecast(large_expected, [large]),
                "small": _compare_forecast(small_expected, on_disk),
            },
            "differs": {"saved": large["saved_differs"], **_differences(loaded[-1], on_disk[-1])},
            "machine": {"what": describe_machine(), "limit": large["limited by"], "prompts": prompts},
        },
        options.json,
    )


def _run_large(folder: Path, prompts: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what a run took, and what had been forecast for it."""
    with _limited_memory(int(LIMIT * 1e9)) as (how, join, flags):
        flags = ["--cold", *ON_DISK, "--prompts", str(prompts), *flags]
        expected = _run_child(folder, [*flags, "--forecast"], join)
        found = _run_child(folder, flags, join)
    return {**found, "limited by": how}, expected


def _compare_forecast(expected: dict[str, Any], runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return for each stage the forecast over the measurement. The forecast combines some stages."""
    measured_as = {"VERIFY": ["VERIFY"], "SAVE": ["SAVE"], "SCORE × 2": ["SCORE live", "SCORE saved"]}
    ratios = {}
    for name, stage in expected["expected"].items():
        times = expected["passes"] if name.startswith("PROBE") else 1
        parts = [[run["stages"][part] for part in measured_as.get(name, ["PROBE"])] for run in runs]
        took = median(sum(part["seconds"] for part in run) for run in parts) * times
        peak = median(max(part["peak"] for part in run) for run in parts)
        ratios[name] = {"seconds": stage["seconds"] / took, "peak": stage["peak"] / peak}
    return ratios


def _run_in_turns(folder: Path, prompts: int, repeats: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return runs in memory and on disk, made in turns."""
    runs: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    for _ in range(repeats):
        for results, flags in zip(runs, (["--loaded"], ON_DISK), strict=True):
            results.append(_run_child(folder, [*flags, "--prompts", str(prompts)]))
    return runs


def _median_seconds(runs: list[dict[str, Any]], stage: str) -> float:
    return float(median(run["stages"][stage]["seconds"] for run in runs))


def _differences(loaded: dict[str, Any], on_disk: dict[str, Any]) -> dict[str, float]:
    """Return the differences of what PROBE found relative to its largest value, and the largest of any score."""
    one, two = loaded["kept"], on_disk["kept"]
    scores = [abs(on_disk["scores"][k] - v) / max(abs(v), 1e-3) for k, v in loaded["scores"].items()]  # shares may be 0
    return {name: float((two[name] - one[name]).abs().max() / one[name].abs().max()) for name in ("means", "basis")} | {
        "scores": max(scores)
    }


def _run_child(folder: Path, flags: list[str], join: Any = None) -> dict[str, Any]:
    out = PLACE / "out"
    shutil.rmtree(out, ignore_errors=True)
    say(f"{folder.name} {' '.join(flags)} …")
    command = [sys.executable, "-W", "ignore", "-m", "bench.streamed_stages", str(folder), str(out), *flags]
    done = subprocess.run(command, stdout=subprocess.PIPE, preexec_fn=join, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    if Path(f"{out}.pt").is_file():  # a forecast leaves no such file
        found["kept"] = torch.load(f"{out}.pt")
        Path(f"{out}.pt").unlink()
    shutil.rmtree(out, ignore_errors=True)
    return found


@contextmanager
def _limited_memory(size: int) -> Iterator[tuple[str, Any, list[str]]]:
    """Yield what enforces the limit, what a child calls before it starts, and the child's flags."""
    group = CGROUPS / f"obliteratus-{os.getpid()}"
    if not os.access(CGROUPS, os.W_OK) or os.geteuid() != 0:
        yield "RLIMIT_AS", None, ["--limit", str(size)]
        return
    group.mkdir()
    (group / "memory.limit_in_bytes").write_text(str(size), encoding="utf-8")
    try:
        yield "memory cgroup", lambda: (group / "cgroup.procs").write_text(str(os.getpid()), encoding="utf-8"), []
    finally:
        group.rmdir()


if __name__ == "__main__":
    main()
