"""The list of benchmarks that bench.smoke runs. That they run is checked by bench.smoke itself, in CI."""

from __future__ import annotations

import importlib
import inspect

from bench.smoke import list_benchmarks


def test_every_benchmark_is_listed_and_takes_arguments() -> None:
    names = list_benchmarks()
    assert {"probe", "verify", "methods", "search", "study", "streaming", "heretic", "docs"} <= set(names)
    assert not {"smoke", "common", "hypervolume", "terminal", "streamed_stages"} & set(names)
    for name in names:
        main = importlib.import_module(f"bench.{name}").main
        assert list(inspect.signature(main).parameters) == ["argv"], name
