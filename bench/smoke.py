"""Run every benchmark at its smallest size, and fail if one of them raises: `python -m bench.smoke [NAME…]`.

Every module of this package with a function ``main`` is a benchmark, so a new one is included by itself.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
import time
import traceback
from collections.abc import Sequence

import bench
from bench.common import say


def list_benchmarks() -> list[str]:
    """Return the names of all modules with a function ``main`` except this one."""
    names = [module.name for module in pkgutil.iter_modules(bench.__path__) if module.name != "smoke"]
    return [name for name in names if hasattr(importlib.import_module(f"bench.{name}"), "main")]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the named benchmarks, or all, and return how many raised."""
    names = sys.argv[1:] if argv is None else argv
    failed = []
    for name in names or list_benchmarks():
        start = time.perf_counter()
        try:
            importlib.import_module(f"bench.{name}").main(["--smoke"])
        except (Exception, SystemExit):  # noqa: BLE001  # whatever it is, the others are to run too
            traceback.print_exc()
            failed.append(name)
        say(f"bench.{name}: {'failed' if name in failed else 'ran'} in {time.perf_counter() - start:.0f} s")
    say(f"failed: {', '.join(failed)}" if failed else "all benchmarks ran")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
