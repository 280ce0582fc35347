"""Requests for answers, and the one thread that runs the model: it writes the answers of all of them side by side.

A request waits in a bounded queue until its row joins the batch. Whatever happens to it then, its listener hears of it:
each token, and at last an `Ending`.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Condition, Thread
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from obliteratus.core.errors import UserError
from obliteratus.core.types import Plan, Subject
from obliteratus.excise.live.hooks import attached
from obliteratus.inference.batching import token_budget
from obliteratus.inference.chat_template import find_answer_end
from obliteratus.inference.continuous import RunningBatch
from obliteratus.inference.generate import answer_budget, stop_tokens
from obliteratus.inference.stream import AnswerLimits, count_begun, draw_token
from obliteratus.serve.prepared_plans import PreparedPlans, Setting

log = logging.getLogger(__name__)
Reason = Literal["stop", "length", "late", "stopping", "failed", "memory", "bug"]
COMPLETE: tuple[Reason, ...] = ("stop", "length")


class Ending(NamedTuple):
    """How an answer ended."""

    reason: Reason
    """``stop`` if the model ended it, ``length`` if it reached its number of tokens. All others are failures."""
    message: str = ""
    """Of a failure: one line for the user."""


Listener = Callable[[list[int] | Ending], None]
"""Hears new tokens of an answer, and last how it ended. Called from the model's thread."""


@dataclass(frozen=True)
class Order:
    """What is to be answered, and how."""

    ids: list[int]
    setting: Setting
    limits: AnswerLimits


@dataclass(frozen=True)
class ServerLimits:
    """How much a server takes on. Raises UserError for values out of range."""

    rows: int = 64
    """Most answers that are written side by side."""
    queue: int = 64
    """Most requests that wait for that."""
    seconds: float = 600.0
    """Most time from a request's arrival to the end of its answer."""

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise UserError(f"--rows {self.rows}: at least 1 answer must be written at a time")
        if self.queue < 0:
            raise UserError(f"--queue {self.queue}: give 0 or more requests that may wait")
        if not (math.isfinite(self.seconds) and self.seconds > 0):
            raise UserError(f"--time-limit {self.seconds:g}: give a positive number of seconds")


class QueueFullError(Exception):
    """As many requests wait as may."""


class StoppingError(Exception):
    """The server takes no further requests."""


@dataclass(eq=False)
class Ticket:
    """A request that was taken on."""

    order: Order
    listen: Listener
    deadline: float
    """`time.monotonic` at which it ends in any case."""
    generator: torch.Generator
    canceled: bool = False
    """Nobody listens any more."""
    counted_as: str = "canceled"
    """How a canceled one ended, in `ModelWorker.counts`."""
    ended: bool = False
    tokens: list[int] = field(default_factory=list)
    told: int = 0
    """Tokens that the listener has heard of. Those that may begin the end mark are held back."""

    @property
    def reserved(self) -> int:
        """Most tokens that it will take in the cache."""
        return len(self.order.ids) + self.order.limits.tokens


class ModelWorker:
    """Takes requests from any thread, and answers them in its own, until `stop`."""

    def __init__(self, subject: Subject, plans: Mapping[str, Plan], limits: ServerLimits) -> None:
        self.subject, self.limits = subject, limits
        self.plans = PreparedPlans(subject, plans)
        self.counts: Counter[str] = Counter()
        """Requests by how they ended, ``canceled`` and ``refused`` among them."""
        self.batch, self.running, self.waiting = RunningBatch(subject), list[Ticket](), deque[Ticket]()
        self.stops, self.budget = stop_tokens(subject), answer_budget(subject)
        mark = find_answer_end(subject)
        self.mark = mark if len(mark) > 1 else ()
        self._changed = Condition()
        self._ends_at = math.inf
        self._thread = Thread(target=self._run, name="model")

    # ------------------------------------------------------------------------------- from any thread
    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, order: Order, listen: Listener) -> Ticket:
        """Take a request on. Raises QueueFullError, StoppingError after `stop`, and UserError for one too large."""
        deadline = time.monotonic() + self.limits.seconds
        ticket = Ticket(order, listen, deadline, torch.Generator().manual_seed(order.limits.seed))
        if ticket.reserved > 2 * self.budget:  # which is half of the free memory
            raise UserError(f"{ticket.reserved} tokens of prompt and answer do not fit into memory; ask for fewer")
        with self._changed:
            self.check_room()
            self.waiting.append(ticket)
            self._changed.notify()
        return ticket

    def check_room(self) -> None:
        """Raise QueueFullError or StoppingError if no request can be taken on at this moment."""
        if self._ends_at < math.inf:
            raise StoppingError
        # A free row takes its request within a step, so requests for it do not count as waiting.
        with self._changed:
            if len(self.waiting) >= self.limits.queue + max(0, self.limits.rows - len(self.running)):
                self.counts["refused"] += 1
                raise QueueFullError

    def cancel(self, ticket: Ticket, complete: bool = False) -> None:
        """Write no further tokens of a request, whose listener hears nothing more.

        complete: its client has all that it wants, and is not gone.
        """
        with self._changed:
            ticket.counted_as = "stop" if complete else "canceled"
            ticket.canceled = True
            if ticket in self.waiting:
                self.waiting.remove(ticket)
                self._tell(ticket, GONE)

    def stop(self, grace: float) -> None:
        """Take no further requests, tell those that wait, and give running ones ``grace`` seconds. Returns at once."""
        with self._changed:
            self._ends_at = min(self._ends_at, time.monotonic() + grace)
            waiting, self.waiting = list(self.waiting), deque()
            self._changed.notify()
        for ticket in waiting:
            self._tell(ticket, STOPPING)

    def join(self) -> None:
        """Wait until the thread has ended, after `stop`."""
        self._thread.join()

    # --------------------------------------------------------------------------- in the model's thread
    def _run(self) -> None:
        while self._wait_for_work():
            with self._told_of_failures():
                self._end_overdue()
                self._let_in()
                self._step()
        for ticket in self.running:
            self._tell(ticket, STOPPING)
        self._leave(self.running)

    def _wait_for_work(self) -> bool:
        """Wait until there is something to do. Return False once everything is over."""
        with self._changed:
            while not (self.waiting or self.running) and self._ends_at == math.inf:
                self._changed.wait()
            return time.monotonic() < self._ends_at and bool(self.waiting or self.running)

    def _end_overdue(self) -> None:
        """End requests that took too long, and forget those whose client is gone."""
        now = time.monotonic()
        with self._changed:
            overdue = [ticket for ticket in self.waiting if ticket.deadline <= now]
            self.waiting = deque(ticket for ticket in self.waiting if ticket.deadline > now)
        overdue += [ticket for ticket in self.running if ticket.deadline <= now or ticket.canceled]
        for ticket in overdue:
            self._tell(ticket, Ending("late", f"the answer was not complete after {self.limits.seconds:g} seconds"))
        self._leave(overdue)

    def _let_in(self) -> None:
        """Run the prompts of requests that wait, as many as fit and as make one pass."""
        group = self._take_group()
        for setting in dict.fromkeys(ticket.order.setting for ticket in group):
            own = [ticket for ticket in group if ticket.order.setting == setting]
            own.sort(key=lambda ticket: -len(ticket.order.ids))
            started = []
            with self._told_of_failures(own, alone=True), attached(self.plans.compile_one(setting)):
                started = [self.batch.run_prompts([ticket.order.ids for ticket in own])]
            for batch, logits in started:
                with self._told_of_failures(own):
                    self.batch.join(batch)
                    self.running += own
                    self._append(own, logits)

    def _take_group(self) -> list[Ticket]:
        """Return the next requests, in the order in which they came. A prompt never waits for a later one."""
        group: list[Ticket] = []
        tokens, budget = 0, token_budget(self.subject)
        with self._changed:
            while self.waiting and self._fits(self.waiting[0], group):
                tokens += len(self.waiting[0].order.ids)
                if group and tokens > budget:
                    break  # the others wait for one step, so that answers which are being written go on
                group.append(self.waiting.popleft())
        return group

    def _fits(self, ticket: Ticket, group: Sequence[Ticket]) -> bool:
        """Return whether a request can join now, beside those of the group."""
        rows = [*self.running, *group]
        if not rows:
            return True  # alone it runs, or fails for want of memory
        longest = max(own.reserved for own in (*rows, ticket))
        if len(rows) >= self.limits.rows or (len(rows) + 1) * longest > self.budget:
            return False
        if not self.batch.recurrent:
            return True
        first = group[0].order if group else ticket.order
        alike = (len(first.ids), first.setting) == (len(ticket.order.ids), ticket.order.setting)
        return not self.running and alike  # padding would enter recurrent states

    def _step(self) -> None:
        """Write a further token of every answer."""
        rows = self.running
        if not rows:
            return
        settings = tuple(sorted({ticket.order.setting for ticket in rows}))
        one = len(settings) == 1
        plans = self.plans.compile_one(settings[0]) if one else self.plans.compile_several(settings)
        variants = None if one else [settings.index(ticket.order.setting) for ticket in rows]
        with attached(plans):
            logits = self.batch.advance([ticket.tokens[-1] for ticket in rows], variants)
        self._append(rows, logits)

    def _append(self, rows: Sequence[Ticket], logits: Tensor) -> None:
        """Choose each row's next token, and tell its listener. Rows that end leave the batch."""
        endings = [self._choose(*pair) for pair in zip(rows, logits.float().cpu(), strict=True)]
        ended = [(ticket, ending) for ticket, ending in zip(rows, endings, strict=True) if ending is not None]
        for ticket, ending in ended:
            self._tell(ticket, ending)
        self._leave([ticket for ticket, _ in ended])

    def _choose(self, ticket: Ticket, logits: Tensor) -> Ending | None:
        """Add one token to an answer. Return how the answer ended, or None if it goes on."""
        try:
            token = draw_token(logits, ticket.order.limits, ticket.generator)
        except UserError as error:
            return Ending("failed", str(error))
        if token in self.stops:
            return self._release(ticket, 0, Ending("stop"))
        ticket.tokens.append(token)
        begun = count_begun(ticket.tokens, self.mark)
        if self.mark and begun == len(self.mark):
            return self._release(ticket, begun, Ending("stop"))
        if len(ticket.tokens) >= ticket.order.limits.tokens:
            return self._release(ticket, 0, Ending("length"))
        return self._release(ticket, begun, None)

    def _release(self, ticket: Ticket, held: int, ending: Ending | None) -> Ending | None:
        """Tell the listener of all tokens but the last ``held``."""
        end = len(ticket.tokens) - held
        if end > ticket.told and not ticket.canceled:
            ticket.listen(ticket.tokens[ticket.told : end])
            ticket.told = end
        return ending

    def _tell(self, ticket: Ticket, ending: Ending) -> None:
        """Count how a request ended, once, and tell its listener unless nobody listens any more."""
        with self._changed:
            if ticket.ended:
                return
            ticket.ended, canceled = True, ticket.canceled
            self.counts[ticket.counted_as if canceled else ending.reason] += 1
        if not canceled:
            ticket.listen(ending)

    def _leave(self, tickets: Sequence[Ticket]) -> None:
        """Take rows out of the batch."""
        gone = set(map(id, tickets))
        places = [place for place, ticket in enumerate(self.running) if id(ticket) in gone]
        if places:
            self.running = [self.running[place] for place in self.batch.leave(places)]

    @contextmanager
    def _told_of_failures(self, own: Sequence[Ticket] = (), alone: bool = False) -> Iterator[None]:
        """Tell requests of whatever goes wrong inside the block, and go on with others. A bug is logged.

        own: requests that are not in the batch yet. alone: the batch is not touched in the block, so its rows go on.
        """
        try:
            yield
        except torch.OutOfMemoryError:
            self._fail(own, alone, Ending("memory", OUT_OF_MEMORY))
        except Exception as error:  # no request may be lost without a word, and others wait
            log.error("a bug ended requests", exc_info=error)
            message = f"{type(error).__name__}: this is a bug; the server's terminal shows more"
            self._fail(own, alone, Ending("bug", message))

    def _fail(self, own: Sequence[Ticket], alone: bool, ending: Ending) -> None:
        """End requests whose pass failed. If the batch was in it, it may be half changed, and is begun anew."""
        for ticket in own if alone else [*own, *self.running]:
            self._tell(ticket, ending)
        if not alone:
            self.running, self.batch = [], RunningBatch(self.subject)

    def summarize(self) -> dict[str, Any]:
        """Return how many requests wait and run at this moment, and how the earlier ones ended."""
        return {"running": len(self.running), "waiting": len(self.waiting), "ended": dict(self.counts)}


STOPPING = Ending("stopping", "the server is stopping")
GONE = Ending("stopping", "its client is gone")  # which nobody hears: it is counted as the client left it
OUT_OF_MEMORY = "the device's memory ran out; send shorter requests, or fewer at once (serve --rows)"
