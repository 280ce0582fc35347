"""Time and memory until a command line is answered: help, methods, usage errors, and the first line of a run.

    python -m bench.start [--quick] [--smoke] [--json]

Seconds are those of the CPU, user and system, so that a busy machine does not count. The first line of a run is one on
stderr as in a log; a terminal shows a bar before it. tests/cli/test_start.py counts what is imported.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from statistics import median
from typing import Any

import psutil

from bench.common import make_parser, print_report, say
from obliteratus.cli.commands import COMMANDS

# A small process of its own starts the command, since Linux counts the memory of whoever starts a process as its own.
LAUNCH = """
import json, os, subprocess, sys
child = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
used = os.wait4(child.pid, 0)[2]
print(json.dumps([used.ru_utime + used.ru_stime, used.ru_maxrss * 1024]))
"""
PROGRAM = [sys.executable, "-m", "obliteratus"]
FIXED = {
    "import obliteratus": [sys.executable, "-c", "import obliteratus"],
    "--help": [*PROGRAM, "--help"],
    "methods": [*PROGRAM, "methods"],
    "methods rdo": [*PROGRAM, "methods", "rdo"],
    "an unknown command": [*PROGRAM, "fly"],
    "an unknown method": [*PROGRAM, "run", "m", "--method", "fly"],
    "no prompts": [*PROGRAM, "run", "m"],
}
RUN = [*PROGRAM, "run", "organism:astronomy", "--target", "organism:astronomy", "--control", "organism:astronomy"]


def measure_start(command: Sequence[str], repeats: int) -> dict[str, float]:
    """Return the median CPU seconds of a command, and the most MiB that it held."""
    found = [
        json.loads(
            subprocess.run([sys.executable, "-S", "-c", LAUNCH, *command], capture_output=True, check=True).stdout
        )
        for _ in range(repeats)
    ]
    peak = max(peak for _, peak in found)
    return {"cpu": round(median(cpu for cpu, _ in found), 3), "peak_mib": round(peak / 2**20, 1)}


def measure_first_line(command: Sequence[str]) -> float:
    """Return the CPU seconds of a command until its first line on stderr, after which it is ended."""
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert child.stderr is not None
    try:
        child.stderr.readline()
        times = psutil.Process(child.pid).cpu_times()
    finally:
        child.kill()
        child.communicate()
    return round(times.user + times.system, 3)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and print the report."""
    options = make_parser(__doc__, "measure once").parse_args(argv)
    repeats = 1 if options.quick or options.smoke else 5
    commands = FIXED | {f"{name} --help": [*PROGRAM, name, "--help"] for name in COMMANDS}
    if options.smoke:
        commands = {name: FIXED[name] for name in ("import obliteratus", "--help")}
    found: dict[str, Any] = {}
    for name, command in commands.items():
        found[name] = measure_start(command, repeats)
        say(f"{name}: {found[name]['cpu']:.2f} s, {found[name]['peak_mib']:.1f} MiB")
    result: dict[str, Any] = {"start": found}
    if not options.smoke:
        result["first_line"] = median(measure_first_line(RUN) for _ in range(min(repeats, 3)))
        say(f"first line of a run: {result['first_line']:.2f} s")
    print_report(result, options.json)


if __name__ == "__main__":
    main()
