"""The parts of the page that Gradio has no component for, as HTML. All values are escaped by the templates."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from obliteratus.rebirth.run_page import PAGE, render_run_page
from obliteratus.serve.ui.job_queue import JobState
from obliteratus.serve.ui.workspace import list_files

if TYPE_CHECKING:
    from jinja2 import Environment
else:
    Environment = Any  # jinja2 is imported when a page is rendered; tests check annotations at run time

SHOWN_ENDED = 1  # finished jobs in the strip: the newest; results are listed below
SHOWN_NOTES = 4  # of the job that runs: what was finished last


def show_jobs(states: Sequence[JobState]) -> str:
    """Return the strip of jobs: what runs and how far, what waits, and what ended last."""
    busy = [state for state in states if not state.finished]
    ended = [state for state in reversed(states) if state.finished and state.kind != "answer"][:SHOWN_ENDED]
    jobs = [describe_job(state, time.monotonic()) for state in (*busy, *ended)]
    return _render("jobs", jobs=jobs)


def describe_job(state: JobState, now: float) -> Mapping[str, Any]:
    """Return what the strip shows of a job. now: `time.monotonic`."""
    ran = state.seconds if state.seconds is not None else now - state.begun if state.begun is not None else None
    bar = state.bars[-1] if state.bars else None
    left = bar.seconds_left(now) if bar else None
    return {
        "state": state,
        "ran": "" if ran is None else format_seconds(ran),
        "bar": bar,
        "doing": _describe_work(state),
        "percent": round(100 * bar.share) if bar else 0,
        "left": "" if left is None else f"{format_seconds(left)} left",
        "notes": state.notes[-SHOWN_NOTES:] if state.status == "running" else (),
    }


def _describe_work(state: JobState) -> str:
    """Return the innermost stage and piece of work; bars are often called like their stage."""
    stage, title = "".join(state.stages[-1:]), state.bars[-1].title if state.bars else ""
    return title if title.startswith(stage) else f"{stage}: {title}".removesuffix(": ")


def format_seconds(seconds: float) -> str:
    """Return seconds as minutes and seconds, such as ``1:05``; with hours from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def show_message(text: str, kind: str = "error") -> str:
    """Return a line for people, or nothing for no text. kind: ``error`` or ``done``."""
    return _render("message", text=text, kind=kind) if text else ""


def show_run(name: str) -> str:
    """Return the page of a run in a frame. It has an address of its own, so that the links inside it work."""
    return _render("frame", address=f"page/{quote(name)}")


def read_page(folder: Path) -> str:
    """Return the page of a run: the one that was saved with it, or one made now. Raises UserError without a record."""
    file = folder / PAGE
    return file.read_text(encoding="utf-8") if file.is_file() else render_run_page(folder)


def show_files(kind: str, name: str, folder: Path) -> str:
    """Return links to the files of a run or an export, and to all of them as one ZIP file. kind: a workspace folder."""
    files = [(str(path.relative_to(folder)), format_bytes(path.stat().st_size)) for path in list_files(folder)]
    links = [(file, size, f"download/{kind}/{quote(name)}/{quote(file)}") for file, size in files]
    return _render("files", name=name, links=links, archive=f"download/{kind}/{quote(name)}.zip")


def format_bytes(n: float | int) -> str:
    """Return a number of bytes with its unit, such as ``538 MB``."""
    for unit in ("B", "kB", "MB"):
        if n < 1000:
            return f"{n:.0f} {unit}"
        n /= 1000
    return f"{n:.1f} GB"


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("obliteratus.serve.ui"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _render(template: str, **values: Any) -> str:
    return _environment().get_template(f"{template}.html.j2").render(values)
