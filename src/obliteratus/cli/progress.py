"""Show progress on stderr: bars where a terminal can move its cursor, else a line for what takes long."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from obliteratus.cli.stage_names import describe_stage, format_seconds
from obliteratus.cli.tables import wrap_prose
from obliteratus.core.progress import Advance, Done, Reporter

NAME, TIME = 21, 13  # characters of a stage's name, and of its time: `VERIFY search prompts`, `59 min 59 s`
BAR = 10  # characters, so that a line with all columns fits 80
EVERY = 30.0  # seconds between two lines of one bar in a log: seldom enough to read, often enough to trust


class _Rate(ProgressColumn):
    """Column with the units done and their rate; nothing for work that has no units."""

    def render(self, task: Task) -> Text:
        if task.total is None:
            return Text("")
        speed = task.finished_speed or task.speed
        return Text(f"{int(task.completed)}/{int(task.total)}" + ("" if speed is None else f" {speed:.1f}/s"))


class Lines(Reporter):
    """Reporter that writes lines: one for each finished stage, each note once, and a bar every 30 s."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._noted: set[tuple[str, str]] = set()

    @contextmanager
    def stage(self, name: str) -> Iterator[Done]:
        yield lambda seconds: self._say_done(name, seconds)

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Advance]:
        start = said = perf_counter()
        done = 0

        def advance(new: int) -> None:
            nonlocal done, said
            done, now = done + new, perf_counter()
            if now - said >= EVERY and done < total:
                said = now
                left = (now - start) * (total - done) / max(done, 1)
                rate = f"{done / (now - start):.1f}/s, {format_seconds(left)} left"
                self._say(f"  {title}: {done} of {total}, {rate}", "dim")

        yield advance

    def note(self, title: str, text: str) -> None:
        if (title, text) in self._noted:
            return
        self._noted.add((title, text))
        warns = text.startswith("warning:")
        body = wrap_prose(f"{title}: {text}", self.console.width - 2)
        for mark, line in zip(["! " if warns else "· ", *["  "] * len(body)], body, strict=False):
            self._say(mark + line, "yellow" if warns else "dim")

    def _say_done(self, name: str, seconds: float) -> None:
        time, room = format_seconds(seconds), self.console.width - NAME - TIME - 3
        words = describe_stage(name)
        words = words if len(words) <= room else ""
        self._say(f"✓ {name:<{NAME}} {words:<{max(room, 0)}}{time:>{TIME}}", "green")

    def _say(self, line: str, style: str) -> None:
        self.console.print(line, style=style, markup=False, soft_wrap=True)


class Bars(Lines):
    """Reporter that also shows a line for each stage and bar that is running. It disappears when its work is done."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=BAR), _Rate(Column(no_wrap=True)))
        self._progress = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True)
        self.live = self._progress

    @contextmanager
    def stage(self, name: str) -> Iterator[Done]:
        with self._running(name, None), super().stage(name) as done:
            yield done

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Advance]:
        with self._running(f"  {title}", total) as advance:
            yield advance

    @contextmanager
    def _running(self, title: str, total: int | None) -> Iterator[Advance]:
        task = self._progress.add_task(title, total=total)
        try:
            yield lambda done: self._progress.advance(task, done)
        finally:
            self._progress.remove_task(task)


def make_reporter() -> Lines:
    """Return bars for a terminal that can move its cursor, else lines.

    They go to what stderr is now: while other libraries are hushed, stderr is another one.
    """
    console = Console(file=sys.stderr, highlight=False)
    return Bars(console) if console.is_terminal and not console.is_dumb_terminal else Lines(console)
