"""Report progress from the library to whoever started it.

The command line installs progress bars, and a test may install a list. Where nobody did, public functions that take
long (`shows_progress`) show bars on stderr, and all others show nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import wraps
from importlib import import_module
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
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
NOBODY = Reporter()
"""Stands for no reporter at all."""
_reporter: ContextVar[Reporter] = ContextVar("reporter", default=NOBODY)
VARIABLE = "OBLITERATUS_PROGRESS"
"""Environment variable: ``off`` shows no progress where nobody asked for any."""
_makers: list[str] = []


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


def register_reporter_module(module: str) -> None:
    """Name the module whose ``make_reporter()`` shows progress to people. It is imported when that is wanted."""
    _makers[:] = [module]


@contextmanager
def show_progress(shown: bool = True) -> Iterator[None]:
    """Inside, all functions show stages, bars and notes on stderr; with False none does.

    >>> with ob.show_progress(False):
    ...     acts = ob.collect_activations(subject, prompts)
    """
    made: Reporter = import_module(_makers[0]).make_reporter() if shown and _makers else SILENT
    with made.live, report_to(made):
        yield


def shows_progress(function: Callable[P, T]) -> Callable[P, T]:
    """Let a function that takes long show its progress, unless a caller has said where progress goes."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        if _reporter.get() is not NOBODY or os.environ.get(VARIABLE) == "off":
            return function(*args, **kwargs)
        with show_progress():
            return function(*args, **kwargs)

    return run
