"""Views of a search: its front as a table and as a plot among all trials."""

from __future__ import annotations

from typing import Any

from obliteratus.core.views import Rows, register_view
from obliteratus.report.notebook import make_view
from obliteratus.search.output import draw_front, front_rows
from obliteratus.search.run import SearchResult


def tabulate_search(result: SearchResult) -> Rows:
    """Return a row for each member of the front: its trial, objectives and drawn values."""
    objectives = [name.removeprefix("-") for name in result.run.search["minimize"]]
    paths = list(dict.fromkeys(path for member in result.front for path in member.trial.values))
    rows: list[list[Any]] = []
    for i, member in enumerate(result.front):
        scores = [member.scores[name] for name in objectives]
        values = [member.trial.values.get(path) for path in paths]
        rows.append([i + 1, i == result.picked, member.trial.number, *scores, *values])
    return ["member", "chosen", "trial", *objectives, *paths], rows


def show_search(result: SearchResult) -> tuple[str, Rows]:
    """Return what was found, and the front's table as the terminal shows it."""
    columns, rows = front_rows(result)
    return result.describe(), (["member", *columns[1:]], [list(row) for row in rows])


register_view(SearchResult, make_view(tabulate_search, lambda result, figure: draw_front(result, figure), show_search))
