"""Probe, edit, verify and save a checkpoint that is larger than the memory allowed, and compare with one that fits.

Two checkpoints with random weights (`bench.synthetic`). The large one runs under a limit that the system enforces: a
memory cgroup where one can be made, else RLIMIT_AS; the file cache forgets it before each stage, so what a stage reads
comes from disk. The small one runs with its weights in memory and on disk, its files in the cache, in turns.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.common import describe_machine, parse_options, print_report, say
from bench.synthetic import write_checkpoint

PLACE = Path(tempfile.gettempdir()) / "obliteratus-bench"
# Gigabytes: the large one more than three times its limit, in which the program's own budget leaves room for the page
# tables and what the file cache cannot give back at once.
LARGE, LIMIT, BUDGET = 5.4, 1.3, 1.2
SMALL, PROMPTS = 1.5, 32
# Without the comparison of three times: a limit cannot be below what Python, torch and two blocks take.
QUICK_LARGE, QUICK_PROMPTS = 1.5, 6
CGROUPS = Path("/sys/fs/cgroup/memory")
AWAY = ["--memory", str(BUDGET * 1e9)]
STAGES = ("PROBE", "VERIFY", "SAVE", "SCORE live", "SCORE saved")


def main() -> None:
    """Prints seconds, ratios, memory, and by how much results differ."""
    options = parse_options(__doc__ or "")
    prompts = QUICK_PROMPTS if options.quick else PROMPTS
    large, large_expected = _large(write_checkpoint(PLACE / "large", QUICK_LARGE if options.quick else LARGE), prompts)
    small = write_checkpoint(PLACE / "small", SMALL, 1024)
    small_expected = _child(small, [*AWAY, "--forecast", "--prompts", str(prompts)])
    loaded, away = _turns(small, prompts, 1 if options.quick else options.repeats)
    size = sum(file.stat().st_size for file in (PLACE / "large").glob("*.safetensors"))
    throughput = {f"throughput {stage}": _median(loaded, stage) / _median(away, stage) for stage in STAGES[:2]}
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
                "large": _told(large_expected, [large]),
                "small": _told(small_expected, away),
            },
            "differs": {"saved": large["saved_differs"], **_differences(loaded[-1], away[-1])},
            "machine": {"what": describe_machine(), "limit": large["limited by"], "prompts": prompts},
        },
        options.json,
    )


def _large(folder: Path, prompts: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a run took, and what the planner had said of it."""
    with _limit(int(LIMIT * 1e9)) as (how, join, flags):
        flags = ["--cold", *AWAY, "--prompts", str(prompts), *flags]
        expected = _child(folder, [*flags, "--forecast"], join)
        found = _child(folder, flags, join)
    return {**found, "limited by": how}, expected


def _told(expected: dict[str, Any], runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Of each stage what was forecast over what was measured; the planner takes some together."""
    of = {"VERIFY": ["VERIFY"], "SAVE": ["SAVE"], "SCORE × 2": ["SCORE live", "SCORE saved"]}
    told = {}
    for name, said in expected["expected"].items():
        times = expected["passes"] if name.startswith("PROBE") else 1
        parts = [[run["stages"][part] for part in of.get(name, ["PROBE"])] for run in runs]
        took = median(sum(part["seconds"] for part in run) for run in parts) * times
        peak = median(max(part["peak"] for part in run) for run in parts)
        told[name] = {"seconds": said["seconds"] / took, "peak": said["peak"] / peak}
    return told


def _turns(folder: Path, prompts: int, repeats: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Runs in memory and on disk, one after the other."""
    runs: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    for _ in range(repeats):
        for of, flags in zip(runs, (["--loaded"], AWAY), strict=True):
            of.append(_child(folder, [*flags, "--prompts", str(prompts)]))
    return runs


def _median(runs: list[dict[str, Any]], stage: str) -> float:
    return float(median(run["stages"][stage]["seconds"] for run in runs))


def _differences(loaded: dict[str, Any], away: dict[str, Any]) -> dict[str, float]:
    """Relative to the largest value, of what PROBE found; the largest relative difference of any score."""
    one, two = loaded["kept"], away["kept"]
    scores = [abs(away["scores"][k] - v) / max(abs(v), 1e-3) for k, v in loaded["scores"].items()]  # shares may be 0
    return {name: float((two[name] - one[name]).abs().max() / one[name].abs().max()) for name in ("means", "basis")} | {
        "scores": max(scores)
    }


def _child(folder: Path, flags: list[str], join: Any = None) -> dict[str, Any]:
    out = PLACE / "out"
    shutil.rmtree(out, ignore_errors=True)
    say(f"{folder.name} {' '.join(flags)} …")
    command = [sys.executable, "-W", "ignore", "-m", "bench.streamed_stages", str(folder), str(out), *flags]
    done = subprocess.run(command, stdout=subprocess.PIPE, preexec_fn=join, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    if Path(f"{out}.pt").is_file():  # a forecast leaves none
        found["kept"] = torch.load(f"{out}.pt")
        Path(f"{out}.pt").unlink()
    shutil.rmtree(out, ignore_errors=True)
    return found


@contextmanager
def _limit(size: int) -> Iterator[tuple[str, Any, list[str]]]:
    """(what limits, what a child calls before it starts, its flags)."""
    group = CGROUPS / f"obliteratus-{os.getpid()}"
    if not os.access(CGROUPS, os.W_OK) or os.geteuid() != 0:
        yield "RLIMIT_AS", None, ["--limit", str(size)]
        return
    group.mkdir()
    (group / "memory.limit_in_bytes").write_text(str(size))
    try:
        yield "memory cgroup", lambda: (group / "cgroup.procs").write_text(str(os.getpid())), []
    finally:
        group.rmdir()


if __name__ == "__main__":
    main()
