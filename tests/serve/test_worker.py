"""The model's thread: every request gets the answer that it would get alone, or is told why it gets none."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tests.support.api_server import PATIENCE, wait_until
from tests.support.plans import random_plan
from tests.support.tiny import tiny_subject

from obliteratus.core.errors import UserError
from obliteratus.core.types import Plan, Subject
from obliteratus.excise.live.hooks import applied
from obliteratus.inference.generate import generate
from obliteratus.inference.stream import AnswerLimits
from obliteratus.serve.prepared_plans import UNEDITED, PreparedPlans, Setting
from obliteratus.serve.worker import (
    Ending,
    ModelWorker,
    Order,
    QueueFullError,
    ServerLimits,
    StoppingError,
    Ticket,
)

PROMPTS = [[256, *text.encode()] for text in ("What is a comet?", "Why?", "How deep is the sea?", "And the sky, too?")]
SETTINGS = (UNEDITED, Setting("one", 1.0), Setting("one", 0.5), Setting("rows", 1.0), Setting("rows", 2.0))
TOKENS = 12
LONG = 200


@pytest.fixture
def subject() -> Subject:
    """A model whose answers have no end."""
    subject = tiny_subject("llama")
    subject.model.generation_config.eos_token_id = None
    subject.tokenizer.eos_token = None
    return subject


@pytest.fixture
def plans(subject: Subject) -> dict[str, Plan]:
    return {"one": random_plan(subject, strength=1.5), "rows": random_plan(subject, norm="rows", seed=7)}


class Heard:
    """What a listener heard."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ending: Ending | None = None
        self.ended = threading.Event()

    def __call__(self, event: list[int] | Ending) -> None:
        assert self.ending is None, "something came after the end"
        if isinstance(event, Ending):
            self.ending = event
            self.ended.set()
        else:
            self.tokens += event

    @property
    def reason(self) -> str:
        assert self.ended.wait(PATIENCE)
        assert self.ending is not None
        return self.ending.reason


@contextmanager
def running(subject: Subject, plans: dict[str, Plan], **limits: Any) -> Iterator[ModelWorker]:
    worker = ModelWorker(subject, plans, ServerLimits(**limits))
    worker.start()
    try:
        yield worker
    finally:
        worker.stop(0.0)
        worker.join()
    assert not worker.running
    assert worker.batch.cache is None


def order(ids: Sequence[int], setting: Setting = UNEDITED, tokens: int = TOKENS, **limits: Any) -> Order:
    return Order(list(ids), setting, AnswerLimits(tokens, **limits))


def expected(subject: Subject, plans: dict[str, Plan], ids: list[int], setting: Setting) -> list[int]:
    plan = plans[setting.plan].scaled(setting.strength) if setting.strength else Plan()
    with applied(subject, plan):
        return generate(subject, [ids], TOKENS)[0]


@pytest.mark.parametrize("limits", [{}, {"rows": 3}, {"rows": 1}])
def test_answers_under_all_plans_at_once_are_those_of_each_alone(
    subject: Subject, plans: dict[str, Plan], limits: dict[str, int]
) -> None:
    wanted = [(ids, setting) for setting in SETTINGS for ids in PROMPTS]
    heard = [Heard() for _ in wanted]
    with running(subject, plans, **limits) as worker:
        for (ids, setting), one in zip(wanted, heard, strict=True):
            worker.submit(order(ids, setting), one)
        assert {one.reason for one in heard} == {"length"}
    alone = [expected(subject, plans, *pair) for pair in wanted]
    assert [one.tokens for one in heard] == alone
    assert len({tuple(answer) for answer in alone}) > len(alone) / 2  # plans make a difference
    assert worker.summarize() == {"running": 0, "waiting": 0, "ended": {"length": len(wanted)}}


def test_the_model_is_unedited_afterwards(subject: Subject, plans: dict[str, Plan]) -> None:
    with running(subject, plans) as worker:
        one = Heard()
        worker.submit(order(PROMPTS[0], Setting("one", 1.0)), one)
        assert one.reason == "length"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in subject.model.modules())


def test_an_answer_ends_at_the_models_end_or_its_mark(subject: Subject, plans: dict[str, Plan]) -> None:
    whole = expected(subject, plans, PROMPTS[0], UNEDITED)
    for stops, mark in (({whole[6]}, ()), (set(), tuple(whole[6:8]))):
        with running(subject, plans) as worker:
            worker.stops, worker.mark, one = stops, mark, Heard()
            worker.submit(order(PROMPTS[0]), one)
            assert one.reason == "stop"
        first = next(n for n in range(len(whole)) if whole[n] in stops or (mark and tuple(whole[n : n + 2]) == mark))
        assert one.tokens == whole[:first]


def test_draws_are_those_of_their_seed_whatever_else_is_written(subject: Subject, plans: dict[str, Plan]) -> None:
    drawn = order(PROMPTS[0], temperature=1.0, top_p=0.9, seed=3)
    found = []
    for others in (0, 3):
        heard = [Heard() for _ in range(others + 2)]
        with running(subject, plans) as worker:
            for n in range(others):
                worker.submit(order(PROMPTS[n], SETTINGS[n]), heard[n])
            worker.submit(drawn, heard[-2])
            worker.submit(order(PROMPTS[0], temperature=1.0, top_p=0.9, seed=4), heard[-1])
            assert {one.reason for one in heard} == {"length"}
        found.append(heard[-2].tokens)
    assert found[0] == found[1] != heard[-1].tokens


def test_the_queue_is_bounded(subject: Subject, plans: dict[str, Plan]) -> None:
    worker = ModelWorker(subject, plans, ServerLimits(rows=1, queue=2))
    heard = [Heard() for _ in range(3)]
    for one in heard:
        worker.submit(order(PROMPTS[0]), one)
    with pytest.raises(QueueFullError):
        worker.submit(order(PROMPTS[0]), Heard())
    worker.start()
    assert {one.reason for one in heard} == {"length"}
    worker.stop(0.0)
    worker.join()
    assert worker.counts == {"refused": 1, "length": 3}


def test_a_client_that_is_gone_frees_its_row_and_disturbs_nobody(subject: Subject, plans: dict[str, Plan]) -> None:
    heard = [Heard() for _ in range(3)]
    with running(subject, plans) as worker:
        gone = worker.submit(order(PROMPTS[1], tokens=LONG), heard[0])
        worker.submit(order(PROMPTS[0], tokens=LONG), heard[1])
        wait_until(lambda: len(heard[0].tokens) > 3)
        worker.cancel(gone)
        wait_until(lambda: len(worker.running) == 1)
        assert heard[1].reason == "length"
        assert 3 < len(heard[0].tokens) < LONG
        assert heard[0].ending is None
    assert worker.counts == {"canceled": 1, "length": 1}
    assert heard[1].tokens == generate(subject, [PROMPTS[0]], LONG)[0]


def test_a_waiting_request_can_be_given_up(subject: Subject, plans: dict[str, Plan]) -> None:
    worker = ModelWorker(subject, plans, ServerLimits(rows=1, queue=0))
    worker.cancel(worker.submit(order(PROMPTS[0]), Heard()))
    one = Heard()
    worker.submit(order(PROMPTS[1]), one)  # there is room again
    worker.start()
    assert one.reason == "length"
    worker.stop(0.0)
    worker.join()
    assert worker.counts == {"canceled": 1, "length": 1}


@pytest.mark.parametrize(("complete", "counted"), [(True, "stop"), (False, "canceled")])
def test_a_client_that_leaves_in_the_last_step_is_counted(
    subject: Subject, plans: dict[str, Plan], complete: bool, counted: str
) -> None:
    worker, tickets, heard = ModelWorker(subject, plans, ServerLimits(rows=1)), list[Ticket](), list[Any]()

    def leave(event: list[int] | Ending) -> None:
        heard.append(event)
        worker.cancel(tickets[0], complete)

    tickets.append(worker.submit(order(PROMPTS[0], tokens=1), leave))
    worker.start()
    wait_until(lambda: bool(worker.counts))
    worker.stop(0.0)
    worker.join()
    assert (len(heard), worker.counts) == (1, {counted: 1})


def test_what_takes_too_long_is_told(subject: Subject, plans: dict[str, Plan]) -> None:
    heard = [Heard() for _ in range(2)]
    with running(subject, plans, rows=1, seconds=0.05) as worker:
        for one in heard:
            worker.submit(order(PROMPTS[0], tokens=LONG), one)
        assert {one.reason for one in heard} == {"late"}
    assert heard[1].ending is not None
    assert heard[1].ending.message == "the answer was not complete after 0.05 seconds"
    assert len(heard[0].tokens) < LONG


@pytest.mark.parametrize(("grace", "reason"), [(0.0, "stopping"), (float(PATIENCE), "length")])
def test_a_stop_tells_those_that_wait_and_gives_the_others_time(
    subject: Subject, plans: dict[str, Plan], grace: float, reason: str
) -> None:
    worker, heard = ModelWorker(subject, plans, ServerLimits(rows=1)), [Heard(), Heard()]
    worker.start()
    worker.submit(order(PROMPTS[0], tokens=LONG), heard[0])
    wait_until(lambda: bool(heard[0].tokens))
    worker.submit(order(PROMPTS[1]), heard[1])
    worker.stop(grace)
    assert heard[1].reason == "stopping"
    assert heard[0].reason == reason
    with pytest.raises(StoppingError):
        worker.submit(order(PROMPTS[0]), Heard())
    worker.join()


def test_a_bug_is_told_and_others_are_served(
    subject: Subject, plans: dict[str, Plan], caplog: pytest.LogCaptureFixture
) -> None:
    heard = [Heard() for _ in range(3)]
    with running(subject, plans) as worker:
        worker.submit(order(PROMPTS[0], tokens=LONG), heard[0])
        wait_until(lambda: bool(heard[0].tokens))
        worker.submit(order([10**6]), heard[1])  # a token that the model does not have
        assert heard[1].reason == "bug"
        worker.submit(order(PROMPTS[0]), heard[2])
        assert heard[2].reason == heard[0].reason == "length"
    assert heard[2].tokens == expected(subject, plans, PROMPTS[0], UNEDITED)
    assert heard[1].ending == Ending("bug", "IndexError: this is a bug; the server's terminal shows more")
    assert caplog.records[0].exc_info is not None


def test_a_model_that_computes_nan_is_told(subject: Subject, plans: dict[str, Plan]) -> None:
    one = Heard()
    with torch.no_grad():
        subject.model.lm_head.weight.fill_(math.nan)
    with running(subject, plans) as worker:
        worker.submit(order(PROMPTS[0]), one)
        assert one.reason == "failed"


def test_rows_beyond_the_memory_wait(subject: Subject, plans: dict[str, Plan]) -> None:
    worker, heard, most = ModelWorker(subject, plans, ServerLimits()), [Heard() for _ in range(6)], []
    worker.budget = 2 * (len(PROMPTS[0]) + TOKENS)

    def watch(one: Heard) -> Any:
        def listen(event: list[int] | Ending) -> None:
            most.append(len(worker.running))
            one(event)

        return listen

    for one in heard:
        worker.submit(order(PROMPTS[0]), watch(one))
    worker.start()
    assert {one.reason for one in heard} == {"length"}
    worker.stop(0.0)
    worker.join()
    assert max(most) == 2


def test_what_never_fits_is_refused(subject: Subject, plans: dict[str, Plan]) -> None:
    worker = ModelWorker(subject, plans, ServerLimits())
    worker.budget = 20
    with pytest.raises(UserError, match="do not fit into memory"):
        worker.submit(order(PROMPTS[0], tokens=LONG), Heard())
    assert not worker.waiting


def test_a_recurrent_model_answers_one_length_at_a_time() -> None:
    subject = tiny_subject("lfm2")
    subject.model.generation_config.eos_token_id = subject.tokenizer.eos_token = None
    heard = [Heard() for _ in PROMPTS]
    with running(subject, {}) as worker:
        for ids, one in zip(PROMPTS, heard, strict=True):
            worker.submit(order(ids), one)
        assert {one.reason for one in heard} == {"length"}
    assert [one.tokens for one in heard] == [generate(subject, [ids], TOKENS)[0] for ids in PROMPTS]


def test_plans_are_compiled_once_for_each_setting(subject: Subject, plans: dict[str, Plan]) -> None:
    prepared = PreparedPlans(subject, plans)
    assert prepared.compile_one(SETTINGS[1]) is prepared.compile_one(SETTINGS[1])
    assert prepared.compile_several(SETTINGS) is prepared.compile_several(SETTINGS)
    assert prepared.compile_one(UNEDITED) == []
    assert len(prepared.readings["rows"]) == len(plans["rows"].edits)  # a norm rule reads each weight once
    assert not prepared.readings["one"]


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"rows": 0}, "--rows 0: at least 1"),
        ({"queue": -1}, "--queue -1: give 0 or more"),
        ({"seconds": 0.0}, "--time-limit 0: give a positive number"),
        ({"seconds": math.nan}, "--time-limit nan: give a positive number"),
    ],
)
def test_limits_are_checked(limits: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        ServerLimits(**limits)
