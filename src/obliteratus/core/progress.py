"""Progress without plumbing: the library reports, whoever started it decides what is shown.

By default nothing is. The command line installs bars; a test may install a list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

Advance = Callable[[int], None]


class Reporter:
    """Shows nothing; the parent of those that do."""

    def bar(self, title: str, total: int) -> AbstractContextManager[Advance]:
        """A piece of work of ``total`` units; what is entered takes the number of units done since last."""
        return nullcontext(lambda done: None)

    def note(self, title: str, text: str) -> None:
        """Something was finished."""


SILENT = Reporter()
_reporter: ContextVar[Reporter] = ContextVar("reporter", default=SILENT)


def progress(title: str, total: int) -> AbstractContextManager[Advance]:
    """``with progress("PROBE", 256) as advance: … advance(32)``."""
    return _reporter.get().bar(title, total)


def note(title: str, text: str) -> None:
    """Report that something was finished."""
    _reporter.get().note(title, text)


@contextmanager
def report_to(reporter: Reporter) -> Iterator[None]:
    """Report to ``reporter`` inside the block."""
    token = _reporter.set(reporter)
    try:
        yield
    finally:
        _reporter.reset(token)
