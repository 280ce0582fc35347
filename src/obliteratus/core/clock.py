"""Measure how long each stage takes, such that the times add up, and report each stage once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

from obliteratus.core.progress import show_stage


class Clock:
    """Seconds that each stage took. Those of a stage inside another one count for the inner one alone."""

    def __init__(self) -> None:
        self._began = perf_counter()
        self.seconds: dict[str, float] = {}
        """By stage, in the order in which they ended."""
        self.spent = 0.0
        """Seconds of all stages that ran in this process."""

    @contextmanager
    def time(self, name: str, goes_on: bool = False) -> Iterator[None]:
        """Count the time inside the block for this stage, show the stage meanwhile, and its seconds at the end.

        A stage that fails counts too, but is not shown as done, nor is one that goes on in a later block.
        """
        start, inside = perf_counter(), self.spent
        with show_stage(name) as done:
            try:
                yield
            finally:
                own = perf_counter() - start - (self.spent - inside)
                self.spent += own
                self.seconds[name] = round(self.seconds.get(name, 0.0) + own, 3)
            if not goes_on:
                done(self.seconds[name])

    def account(self) -> dict[str, float]:
        """Return the seconds of all stages, and of what happened beside them as ``other``: they add up to the whole."""
        return {**self.seconds, "other": max(0.0, perf_counter() - self._began - self.spent)}
