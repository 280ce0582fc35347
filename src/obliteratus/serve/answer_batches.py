"""Greedy answers for callers that ask at the same time: who waits together is answered in one batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import Empty, Queue
from threading import Lock, Thread

from obliteratus.core.types import Plan, Subject
from obliteratus.excise.live.hooks import attached, compile_plan
from obliteratus.inference.answers import AnswerDecoder
from obliteratus.inference.generate import IsDone, generate

# Seconds that the first of a batch waits for others. Callers that ask at once arrive within some milliseconds.
WAIT = 0.05


@dataclass(frozen=True)
class Written:
    """An answer as it was written."""

    text: str
    tokens: int
    ended: bool
    """Whether the model or a stop sequence ended it, and not the number of tokens."""


@dataclass(frozen=True)
class Asked:
    """A prompt that waits for its answer."""

    ids: list[int]
    tokens: int
    """Most tokens of the answer."""
    stops: tuple[str, ...] = ()
    """Texts that end the answer, and are left out."""
    answer: Future[Written] = field(default_factory=Future, compare=False)


class AnswerBatches:
    """Answers prompts under a plan in a thread of its own, all that wait at once."""

    def __init__(self, subject: Subject, plan: Plan | None = None) -> None:
        """Compile the plan. Raises UserError if it does not fit the model."""
        self.subject, self.decoder = subject, AnswerDecoder.create(subject)
        self.plan = compile_plan(subject, plan or Plan())
        self.lock = Lock()
        """Held while the plan is live; who else runs the model in another thread takes it too."""
        self.waiting: Queue[Asked | None] = Queue()
        self.thread = Thread(target=self._serve, name="answer batches", daemon=True)
        self.thread.start()

    def ask(self, ids: list[int], tokens: int, stops: Sequence[str] = ()) -> Future[Written]:
        """Return the answer to come. It raises what answering raises, such as torch.OutOfMemoryError."""
        asked = Asked(ids, tokens, tuple(filter(None, stops)))
        self.waiting.put(asked)
        return asked.answer

    def close(self) -> None:
        """End the thread, once all that waits now is answered."""
        self.waiting.put(None)
        self.thread.join()

    def _serve(self) -> None:
        while (first := self.waiting.get()) is not None:
            batch, ended = self._collect(first)
            for group in _group_alike(batch):
                self._answer(group)
            if ended:
                return

    def _collect(self, first: Asked) -> tuple[list[Asked], bool]:
        """Return all that wait, and whether this was the end."""
        batch = [first]
        while True:
            try:
                asked = self.waiting.get(timeout=WAIT)
            except Empty:
                return batch, False
            if asked is None:
                return batch, True
            batch.append(asked)

    def _answer(self, group: Sequence[Asked]) -> None:
        try:
            with self.lock, attached(self.plan):
                done = self._stop_at(group[0].stops)
                rows = generate(self.subject, [asked.ids for asked in group], group[0].tokens, done=done)
        except Exception as error:  # noqa: BLE001  # it is raised where the answer is waited for
            for asked in group:
                asked.answer.set_exception(error)
            return
        for asked, row in zip(group, rows, strict=True):
            asked.answer.set_result(self._finish(row, asked))

    def _stop_at(self, stops: Sequence[str]) -> IsDone | None:
        return (lambda row: any(stop in self.decoder.decode(row) for stop in stops)) if stops else None

    def _finish(self, row: list[int], asked: Asked) -> Written:
        text = self.decoder.decode(row)
        places = [text.index(stop) for stop in asked.stops if stop in text]
        ended = bool(places) or len(row) < asked.tokens
        return Written(text[: min(places)] if places else text, len(row), ended)


def _group_alike(batch: Sequence[Asked]) -> Iterator[list[Asked]]:
    """Yield those that may be written together: with the same limit and the same stop sequences."""
    for kind in dict.fromkeys((asked.tokens, asked.stops) for asked in batch):
        yield [asked for asked in batch if (asked.tokens, asked.stops) == kind]
