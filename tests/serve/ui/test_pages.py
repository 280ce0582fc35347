"""What the strip says of a job."""

from __future__ import annotations

import pytest

from obliteratus.serve.ui.job_queue import Bar, JobState
from obliteratus.serve.ui.pages import describe_job, format_bytes, format_seconds, show_jobs, show_message

BAR = (Bar("VERIFY answers", 10, done=4, started=100.0),)


@pytest.mark.parametrize(
    ("stages", "bars", "doing"),
    [
        (("VERIFY",), BAR, "VERIFY answers"),  # the stage is not said twice
        (("PROBE",), BAR, "PROBE: VERIFY answers"),
        (("PROBE", "TUNE"), (), "TUNE"),
        ((), BAR, "VERIFY answers"),
        ((), (), ""),
    ],
)
def test_what_is_being_done(stages: tuple[str, ...], bars: tuple[Bar, ...], doing: str) -> None:
    state = JobState(1, "t", "run", "running", stages=stages, bars=bars, begun=90.0)
    assert describe_job(state, 108.0)["doing"] == doing


def test_how_far_and_how_long() -> None:
    told = describe_job(JobState(1, "t", "run", "running", bars=BAR, begun=90.0), 108.0)
    assert (told["percent"], told["left"], told["ran"]) == (40, "0:12 left", "0:18")
    assert [format_seconds(x) for x in (0.4, 59.6, 3600)] == ["0:00", "1:00", "1:00:00"]
    assert [format_bytes(x) for x in (999, 1000, 538e6, 1.2e12)] == ["999 B", "1 kB", "538 MB", "1200.0 GB"]


def test_answers_that_are_finished_are_not_listed_and_runs_are() -> None:
    states = [JobState(n, f"title {n}", kind, "done") for n, kind in ((1, "run"), (2, "answer"))]
    shown = show_jobs(states)
    assert "title 1" in shown
    assert "title 2" not in shown
    assert "Nothing is running" in show_jobs([])


def test_a_message_is_no_markup() -> None:
    assert "<b>" not in show_message("<b>x</b>")
    assert show_message("") == ""
