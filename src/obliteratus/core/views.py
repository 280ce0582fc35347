"""Show objects where people look at them: as a line, as HTML in a notebook, as a plot, and as a table for pandas.

What is shown here knows its own line. Packages that know templates and plots register a `View` of its type, and are
imported when something is shown for the first time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from obliteratus.core.errors import UserError

Rows = tuple[list[str], list[list[Any]]]
"""Columns and rows of a table, with numbers as numbers."""


@dataclass(frozen=True)
class View:
    """How objects of one type are shown."""

    tabulate: Callable[[Any], Rows]
    render: Callable[[Any], str]
    """Returns HTML without scripts and addresses."""
    draw: Callable[[Any], Any] | None = None
    """Returns a matplotlib figure."""


_views: dict[type, View] = {}
_modules: list[str] = []


def register_view(kind: type, view: View) -> None:
    """Show objects of this type by that view."""
    _views[kind] = view


def register_view_modules(*modules: str) -> None:
    """Name modules that register views. They are imported when the first one is needed."""
    _modules.extend(modules)


def find_view(shown: object) -> View:
    """Return the view of an object's type. Raises UserError if there is none."""
    while _modules:
        import_module(_modules.pop())
    if type(shown) not in _views:
        raise UserError(f"{type(shown).__name__}: no view of it is registered; see obliteratus.core.views")
    return _views[type(shown)]


class Described:
    """Base class of what is shown by one line. What it holds may be large, and is no part of the line."""

    def describe(self) -> str:
        """Return what this is, in a few words."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.describe()}>"

    def __str__(self) -> str:
        return repr(self)


class Viewable(Described):
    """Base class of what is shown by one line, in notebooks, and as a table."""

    def _repr_html_(self) -> str:
        return find_view(self).render(self)

    def to_pandas(self) -> Any:
        """Return the table as a pandas DataFrame. Raises UserError without pandas, which is an extra."""
        try:
            pandas: Any = import_module("pandas")
        except ImportError as error:
            raise UserError("to_pandas: pandas is not installed; pip install 'obliteratus[notebooks]'") from error
        columns, rows = find_view(self).tabulate(self)
        return pandas.DataFrame(rows, columns=columns)


class Plottable(Viewable):
    """Base class of what can be drawn too."""

    def plot(self) -> Any:
        """Return a matplotlib figure, which notebooks show."""
        draw = find_view(self).draw
        if draw is None:
            raise UserError(f"{type(self).__name__}: there is no plot of it; see obliteratus.core.views")
        return draw(self)
