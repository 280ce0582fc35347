"""Jobs run one at a time and in their order, are seen by everybody, and can be stopped at any moment."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from obliteratus.core.clock import Clock
from obliteratus.core.errors import UserError
from obliteratus.core.progress import note, progress
from obliteratus.serve.ui.job_queue import KEPT_JOBS, Bar, Job, JobQueue, JobState, Written

SOON = 10.0  # seconds; all of these jobs end within milliseconds


@pytest.fixture
def queue() -> Iterator[JobQueue]:
    made = JobQueue(lambda text: text.replace("/home/me/", ""))
    yield made
    made.close()


def wait(queue: JobQueue, number: int) -> JobState:
    return list(queue.follow(number))[-1]


def test_one_at_a_time_in_their_order(queue: JobQueue) -> None:
    running, seen, most = [0], list[int](), [0]

    def work(job: Job) -> str:
        running[0] += 1
        most[0] = max(most[0], running[0])
        time.sleep(0.02)
        seen.append(job.number)
        running[0] -= 1
        return f"job {job.number}"

    numbers = [queue.submit("a title", "run", work) for _ in range(4)]
    ended = [wait(queue, number) for number in numbers]
    assert seen == numbers
    assert most == [1]
    assert [state.message for state in ended] == [f"job {number}" for number in numbers]


def test_progress_and_notes_of_the_library_are_seen(queue: JobQueue) -> None:
    reached, go = threading.Event(), threading.Event()

    def work(job: Job) -> str:
        with Clock().time("VERIFY"):
            pass
        with Clock().time("PROBE"), progress("outer", 10) as advance, progress("inner", 4) as inner:
            advance(3)
            inner(4)
            note("PROBE", "kept in /home/me/out")
            note("PROBE", "kept in /home/me/out")
            reached.set()
            go.wait(SOON)
        return ""

    number = queue.submit("a title", "run", work)
    assert reached.wait(SOON)
    state = queue.state(number)
    assert [(bar.title, bar.share) for bar in state.bars] == [("outer", 0.3), ("inner", 1.0)]
    assert state.stages == ("PROBE",)
    assert state.notes == ("VERIFY: 0.0 s", "PROBE: kept in out")  # once, and without the place
    go.set()
    assert wait(queue, number).bars == wait(queue, number).stages == ()


def test_a_running_job_stops_at_its_next_report(queue: JobQueue) -> None:
    begun = threading.Event()

    def endless(job: Job) -> str:
        with progress("endless", 10**9) as advance:
            begun.set()
            while True:
                advance(1)

    number = queue.submit("endless", "run", endless)
    waiting = queue.submit("waits", "run", lambda job: "done")
    after = queue.submit("after", "run", lambda job: "done")
    assert begun.wait(SOON)
    queue.stop(waiting)
    assert queue.state(waiting).status == "stopped"
    assert queue.state(number).status == "running"
    queue.stop(number)
    assert wait(queue, number).status == "stopped"
    assert wait(queue, after).status == "done"


def test_a_job_that_is_not_stopped_goes_on(queue: JobQueue) -> None:
    """The negative control: without a stop the same reports raise nothing; a stop after the end changes nothing."""

    def work(job: Job) -> str:
        with progress("work", 3) as advance:
            advance(3)
        return "whole"

    number = queue.submit("work", "run", work)
    assert wait(queue, number).status == "done"
    queue.stop(number)
    assert queue.state(number).message == "whole"


def test_errors_end_a_job_and_not_the_worker(queue: JobQueue, caplog: pytest.LogCaptureFixture) -> None:
    def mistaken(job: Job) -> str:
        raise UserError("/home/me/target.txt: the file is empty; give prompts")

    def broken(job: Job) -> str:
        raise ZeroDivisionError("a bug")

    def interrupted(job: Job) -> str:
        raise KeyboardInterrupt("its stages are kept")

    ended = [wait(queue, queue.submit("t", "run", work)) for work in (mistaken, broken, interrupted, lambda job: "ok")]
    assert [state.status for state in ended] == ["failed", "failed", "stopped", "done"]
    assert ended[0].message == "target.txt: the file is empty; give prompts"
    assert "ZeroDivisionError" in ended[1].message
    assert "a bug" in caplog.text
    assert ended[2].message == "its stages are kept"


def test_followers_see_every_end_and_what_is_written(queue: JobQueue) -> None:
    def work(job: Job) -> str:
        for end in range(1, 6):
            job.say((Written("hello"[:end]), Written("", True)))
            time.sleep(0.01)
        return ""

    number = queue.submit("t", "answer", work)
    states = list(queue.follow(number, wait=0.01))
    assert states[-1].finished
    assert not any(state.finished for state in states[:-1])
    assert states[-1].written == (Written("hello"), Written("", True))


def test_closing_stops_what_runs_and_what_waits() -> None:
    queue, begun = JobQueue(), threading.Event()

    def endless(job: Job) -> str:
        begun.set()
        while True:
            job.check_stop()

    numbers = [queue.submit("t", "run", endless) for _ in range(3)]
    assert begun.wait(SOON)
    queue.close()
    assert [queue.state(number).status for number in numbers] == ["stopped"] * 3


def test_old_jobs_are_forgotten(queue: JobQueue) -> None:
    numbers = [queue.submit("t", "run", lambda job: "") for _ in range(KEPT_JOBS + 5)]
    wait(queue, numbers[-1])
    queue.submit("t", "run", lambda job: "")
    assert len(queue.states()) == KEPT_JOBS + 1
    with pytest.raises(KeyError):
        queue.state(numbers[0])


def test_time_left_follows_the_rate() -> None:
    bar = Bar("t", 10, done=4, started=100.0)
    assert bar.seconds_left(now=108.0) == pytest.approx(12.0)  # 4 in 8 s, so 6 in 12
    assert Bar("t", 10, started=100.0).seconds_left(now=108.0) is None
    assert Bar("t", 0).share == 0
