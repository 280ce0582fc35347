"""Show progress bars and notes on stderr, and results on stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from obliteratus.core.progress import Advance, Reporter
from obliteratus.core.results import Run
from obliteratus.rebirth.model_card import (
    PASS_COLUMNS,
    REASON_COLUMNS,
    format_coverage,
    make_pass_rows,
    make_reason_rows,
    make_score_rows,
)
from obliteratus.rebirth.outcome import describe_outcome
from obliteratus.verify.score_names import names_to_show

notes = Console(stderr=True, highlight=False)
results = Console(highlight=False)


class _Rate(ProgressColumn):
    """Column with the measured units per second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f}/s", style="dim")


class Bars(Reporter):
    """Reporter that shows bars and notes on stderr. A bar disappears when its work is done, and a note stays."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), _Rate())
        self.noted: set[tuple[str, str]] = set()
        self.live = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=notes, transient=True)

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Advance]:
        task = self.live.add_task(title, total=total)
        try:
            yield lambda done: self.live.advance(task, done)
        finally:
            self.live.remove_task(task)

    def note(self, title: str, text: str) -> None:
        if (title, text) in self.noted:
            return
        self.noted.add((title, text))
        self.live.console.print(f"[green]✓[/] {title:<14} [dim]{escape(text)}[/]")


def show_json(data: Any) -> None:
    """Print one JSON document on stdout."""
    shows_all = "utf" in (sys.stdout.encoding or "").lower()
    results.out(json.dumps(data, indent=1, ensure_ascii=not shows_all), highlight=False)


def show_run(run: Run) -> None:
    """Print the scores before and after, the decisions, passes, coverage and times of a run."""
    results.print(score_table(run))
    if run.advice:
        results.print(make_table("Decisions, and the measurements behind them", REASON_COLUMNS, make_reason_rows(run)))
    if run.recipe.passes > 1:
        results.print(make_table("Passes, with the rate left on search prompts", PASS_COLUMNS, make_pass_rows(run)))
    for sentence in describe_outcome(run):
        results.print(sentence, markup=False)
    results.print(f"[bold]Edited[/]  {format_coverage(run)}")
    seconds = ", ".join(f"{name} {value:.1f} s" for name, value in run.seconds.items())
    results.print(f"[bold]Time[/]    {seconds}")


def score_table(run: Run) -> Table:
    """Return the table of scores in groups, without details: `run.json` has all of them."""
    title = f"{run.recipe.name or 'recipe'} on {run.source['id']}, held-out prompts, 95 % intervals"
    table = Table(title=escape(title), title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))  # fits 80 columns
    for name in ("score", "before", "after", "n"):
        table.add_column(name, justify="left" if name == "score" else "right", no_wrap=True)
    for group in make_score_rows(run, brief=True):
        for row in group:
            table.add_row(*row)
        table.add_section()
    return table


def make_table(title: str, columns: list[str], rows: list[list[str]]) -> Table:
    """Return a plain table."""
    table = Table(title=escape(title), title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))  # answers and names may hold what looks like markup
    return table


def show_comparison(title: str, against: str, before: dict[str, Any], after: dict[str, Any]) -> None:
    """Print the scores of two models side by side."""
    sides = {against: before, "model": after} if before else {"model": after}
    values = {n: [side[n]["value"] for side in sides.values() if n in side] for n in {**before, **after}}
    shown = [name for group in names_to_show(values, brief=True) for name in group]
    rows = [[name, *(str(side.get(name, {}).get("text", "–")) for side in sides.values())] for name in shown]
    results.print(make_table(title, ["score", *sides], rows))


def format_bytes(n: float | int) -> str:
    """Return a number of bytes with its unit, such as ``538 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit in ("B", "kB", "MB") else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"
