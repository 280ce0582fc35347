"""Jobs for one worker. One at a time runs, so one model at a time is in memory, and everybody sees the same jobs."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from threading import Condition
from typing import Literal, NamedTuple

from obliteratus.core.errors import UserError
from obliteratus.core.noise import hush_libraries
from obliteratus.core.progress import Advance, Done, Reporter, report_to

log = logging.getLogger(__name__)
Status = Literal["waiting", "running", "done", "failed", "stopped"]
FINISHED: tuple[Status, ...] = ("done", "failed", "stopped")
KEPT_JOBS = 50  # finished ones that are listed; the oldest are forgotten
KEPT_NOTES = 40  # of a job; a run makes about 20


@dataclass(frozen=True)
class Bar:
    """Progress of one piece of work inside a job."""

    title: str
    total: int
    done: int = 0
    started: float = 0.0
    """`time.monotonic` at its beginning."""

    @property
    def share(self) -> float:
        """Return what is done of it, 0–1."""
        return min(1.0, self.done / self.total) if self.total else 0.0

    def seconds_left(self, now: float) -> float | None:
        """Return the seconds left at the rate so far, or None until something is done."""
        return (now - self.started) * (1 - self.share) / self.share if self.share else None


class Written(NamedTuple):
    """An answer as it is so far."""

    text: str = ""
    complete: bool = False


@dataclass(frozen=True)
class JobState:
    """What is known of a job at one moment."""

    number: int
    title: str
    kind: str
    """``run``, ``export`` or ``answer``."""
    status: Status = "waiting"
    stages: tuple[str, ...] = ()
    """Stages that run, the outermost first."""
    bars: tuple[Bar, ...] = ()
    """Pieces of work that run, the outermost first."""
    notes: tuple[str, ...] = ()
    written: tuple[Written, ...] = ()
    """What it has written so far, for answers: one entry for each."""
    message: str = ""
    """One line for people once it is finished: what was made, what is wrong, or what is kept."""
    begun: float | None = None
    """`time.monotonic` when it began to run."""
    seconds: float | None = None
    """How long it ran; None until it is finished."""

    @property
    def finished(self) -> bool:
        """Return whether it has ended in any way."""
        return self.status in FINISHED


class Job(Reporter):
    """A job as its work sees it. It takes progress and notes, and raises KeyboardInterrupt there once it is stopped."""

    def __init__(self, queue: JobQueue, number: int) -> None:
        self.queue, self.number = queue, number

    @property
    def state(self) -> JobState:
        """The job at this moment."""
        return self.queue.state(self.number)

    def check_stop(self) -> None:
        """Raise KeyboardInterrupt if somebody has stopped the job. The library's files are then left as by Ctrl-C."""
        if self.queue.is_stopped(self.number):
            raise KeyboardInterrupt

    def say(self, written: tuple[Written, ...]) -> None:
        """Show what has been written so far."""
        self.check_stop()
        self.queue.change(self.number, written=written)

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Advance]:
        """Show a bar inside the block."""
        self.check_stop()
        place = len(self.state.bars)
        self.queue.change(self.number, bars=(*self.state.bars, Bar(title, total, started=time.monotonic())))
        try:
            yield lambda done: self._advance(place, done)
        finally:
            self.queue.change(self.number, bars=self.state.bars[:place])

    def _advance(self, place: int, done: int) -> None:
        bars = list(self.state.bars)
        bars[place] = replace(bars[place], done=bars[place].done + done)
        self.queue.change(self.number, bars=tuple(bars))
        self.check_stop()

    @contextmanager
    def stage(self, name: str) -> Iterator[Done]:
        """Show a stage inside the block, and how long it took once it is finished."""
        self.check_stop()
        place = len(self.state.stages)
        self.queue.change(self.number, stages=(*self.state.stages, name))
        try:
            yield lambda seconds: self.note(name, f"{seconds:.1f} s")
        finally:
            self.queue.change(self.number, stages=self.state.stages[:place])

    def note(self, title: str, text: str) -> None:
        """Show what the library has to say of a stage, a step or an option."""
        said, notes = self.queue.clean(f"{title}: {text}"), self.state.notes
        if said not in notes:
            self.queue.change(self.number, notes=(*notes, said)[-KEPT_NOTES:])


Work = Callable[[Job], str]
"""Does a job and returns one line for people. It may raise UserError, and KeyboardInterrupt once it is stopped."""


class JobQueue:
    """Jobs in their order, one worker, and their states, which any thread may read."""

    def __init__(self, clean: Callable[[str], str] = str) -> None:
        """clean: takes out of notes and messages what is not for every reader, such as where folders are."""
        self.clean = clean
        self._changed = Condition()
        self._states: dict[int, JobState] = {}
        self._futures: dict[int, Future[str]] = {}
        self._stopped: set[int] = set()
        self._numbers: Counter[str] = Counter()
        self._worker = ThreadPoolExecutor(1, "obliteratus-job", initializer=hush_libraries)

    def submit(self, title: str, kind: str, work: Work) -> int:
        """Put a job at the end of the queue, and return its number."""
        with self._changed:
            self._numbers["all"] += 1
            number = self._numbers["all"]
            self._states[number] = JobState(number, title, kind)
            self._forget_oldest()
            self._futures[number] = self._worker.submit(self._run, number, work)
        self._futures[number].add_done_callback(lambda future: self._finish(number, future))
        return number

    def stop(self, number: int) -> None:
        """Stop a job: a waiting one at once, a running one at its next report of progress. A finished one stays."""
        with self._changed:
            if number in self._states and not self._states[number].finished:
                self._stopped.add(number)
        if future := self._futures.get(number):
            future.cancel()

    def close(self) -> None:
        """Stop all jobs, and wait until the running one has left its files in order."""
        for state in self.states():
            self.stop(state.number)
        self._worker.shutdown(wait=True)

    def is_stopped(self, number: int) -> bool:
        """Return whether somebody has stopped the job."""
        return number in self._stopped

    def state(self, number: int) -> JobState:
        """Return a job as it is now. Raises KeyError for one that never was, or was forgotten."""
        with self._changed:
            return self._states[number]

    def states(self) -> tuple[JobState, ...]:
        """Return all jobs as they are now, the oldest first."""
        with self._changed:
            return tuple(self._states.values())

    def follow(self, number: int, wait: float = 0.5) -> Iterator[JobState]:
        """Yield a job whenever it has changed, and every ``wait`` seconds, until it is finished.

        wait: seconds. The last state that is yielded is finished.
        """
        seen: JobState | None = None
        while seen is None or not seen.finished:
            with self._changed:
                if self._states[number] is seen:
                    self._changed.wait(wait)
                seen = self._states[number]
            yield seen

    def change(self, number: int, **fields: object) -> None:
        """Replace fields of a job's state, and wake those who follow it."""
        with self._changed:
            self._states[number] = replace(self._states[number], **fields)  # type: ignore[arg-type]
            self._changed.notify_all()

    def _run(self, number: int, work: Work) -> str:
        job = Job(self, number)
        self.change(number, status="running", begun=time.monotonic())
        with report_to(job):
            job.check_stop()
            return work(job)

    def _finish(self, number: int, future: Future[str]) -> None:
        """Say how a job ended. A bug is logged with its traceback, and the next job runs all the same."""
        begun = self.state(number).begun
        seconds = None if begun is None else time.monotonic() - begun
        status, message = _describe_end(future, self.state(number).title)
        self.change(number, status=status, message=self.clean(message), seconds=seconds, bars=(), stages=())

    def _forget_oldest(self) -> None:
        ended = [number for number, state in self._states.items() if state.finished]
        for number in ended[:-KEPT_JOBS]:
            del self._states[number], self._futures[number]
            self._stopped.discard(number)


def _describe_end(future: Future[str], title: str) -> tuple[Status, str]:
    """Return how a job ended, and the line that says so."""
    if future.cancelled():  # the library's spelling of "canceled"
        return "stopped", "Stopped before it began."
    error = future.exception()
    if error is None:
        return "done", future.result()
    if isinstance(error, KeyboardInterrupt):
        return "stopped", str(error).strip() or "Stopped."
    if isinstance(error, UserError):
        return "failed", str(error)
    log.error("%s failed because of a bug", title, exc_info=error)
    return "failed", f"{type(error).__name__}: this is a bug; the terminal in which the program runs shows more"
