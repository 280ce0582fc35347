"""Report progress from the library to whoever started it.

By default nothing is shown. The command line installs progress bars, and a test may install a list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

Advance = Callable[[int], None]
Done = Callable[[float], None]


class Reporter:
    """Base class of reporters. It shows nothing."""

    live: AbstractContextManager[object] = nullcontext()
    """To be entered while there is something to show."""

    def bar(self, title: str, total: int) -> AbstractContextManager[Advance]:
        """Return a context manager for work of ``total`` units. It yields a function to which
        the number of newly done units is passed."""
        return nullcontext(lambda done: None)

    def stage(self, name: str) -> AbstractContextManager[Done]:
        """Return a context manager for a stage, which may have bars and stages of its own. It yields a function to
        which the stage's seconds are passed when it was finished."""
        return nullcontext(lambda seconds: None)

    def note(self, title: str, text: str) -> None:
        """Show what the user should know of a stage, a step or an option."""


SILENT = Reporter()
_reporter: ContextVar[Reporter] = ContextVar("reporter", default=SILENT)


def progress(title: str, total: int) -> AbstractContextManager[Advance]:
    """Show progress of ``total`` units: ``with progress("PROBE", 256) as advance: … advance(32)``."""
    return _reporter.get().bar(title, total)


def show_stage(name: str) -> AbstractContextManager[Done]:
    """Show a stage while it runs. `core.clock.Clock` also measures it."""
    return _reporter.get().stage(name)


def note(title: str, text: str) -> None:
    """Report what the user should know of a stage, a step or an option."""
    _reporter.get().note(title, text)


@contextmanager
def report_to(reporter: Reporter) -> Iterator[None]:
    """Send progress and notes to ``reporter`` inside the block."""
    token = _reporter.set(reporter)
    try:
        yield
    finally:
        _reporter.reset(token)
