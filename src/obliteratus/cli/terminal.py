"""What a person sees: bars with rate and time left, tables. Notes and bars go to stderr, results to stdout."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
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
    coverage_line,
    pass_rows,
    reason_rows,
    score_rows,
)

notes = Console(stderr=True, highlight=False)
results = Console(highlight=False)


class _Rate(ProgressColumn):
    """Units a second, measured."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f}/s", style="dim")


class Bars(Reporter):
    """Progress on stderr; a bar disappears when its work is done, a note stays."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), _Rate())
        self.live = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=notes, transient=True)

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Advance]:
        task = self.live.add_task(title, total=total)
        try:
            yield lambda done: self.live.advance(task, done)
        finally:
            self.live.remove_task(task)

    def note(self, title: str, text: str) -> None:
        self.live.console.print(f"[green]✓[/] {title:<14} [dim]{text}[/]")


def show_json(data: Any) -> None:
    """The one JSON document on stdout."""
    results.out(json.dumps(data, indent=1, ensure_ascii=False), highlight=False)


def show_run(run: Run) -> None:
    """Before and after, coverage, and where the result is."""
    results.print(score_table(run))
    if run.advice:
        results.print(make_table("Decisions, by what was measured", REASON_COLUMNS, reason_rows(run)))
    if run.recipe.passes > 1:
        results.print(make_table("Passes, refusals on search prompts", PASS_COLUMNS, pass_rows(run)))
    results.print(f"[bold]Edited[/]  {coverage_line(run)}")
    seconds = ", ".join(f"{name} {value:.1f} s" for name, value in run.seconds.items())
    results.print(f"[bold]Time[/]    {seconds}")


def score_table(run: Run) -> Table:
    """All scores but those by category."""
    title = f"{run.recipe.name or 'recipe'} on {run.source['id']}, held-out prompts, 95 % intervals"
    table = Table(title=title, title_justify="left", box=SIMPLE)  # fits 80 columns
    for name in ("score", "before", "after", "n"):
        table.add_column(name, justify="left" if name == "score" else "right", no_wrap=True)
    for row in score_rows(run):
        table.add_row(*row)
    return table


def make_table(title: str, columns: list[str], rows: list[list[str]]) -> Table:
    """A plain table."""
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def show_comparison(title: str, against: str, before: dict[str, Any], after: dict[str, Any]) -> None:
    """Scores of two models side by side."""
    rows = [[name, *(str(x.get(name, {}).get("text", "–")) for x in (before, after))] for name in after]
    results.print(make_table(title, ["score", against, "model"], rows))


def format_bytes(n: float | int) -> str:
    """Bytes for people: 538 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit in ("B", "kB", "MB") else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"
