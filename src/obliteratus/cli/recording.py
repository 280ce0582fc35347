"""Write down what a job was asked to do, so that it can be done again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obliteratus.core.results import Run
from obliteratus.core.run_folder import write_atomic
from obliteratus.core.types import Subject
from obliteratus.excise.plan import load_plan
from obliteratus.rebirth.model_card import render_model_card
from obliteratus.share.reproduce_file import Request, make_reproduce_file, write_reproduce_file

if TYPE_CHECKING:
    from obliteratus.cli.jobs import Job

OPTIONS = ("dtype", "quantize", "device", "trust_remote_code")
"""Arguments of `open_subject` that are recorded as they are."""


def write_reproduction(
    job: Job, subject: Subject, record: Run, opening: Mapping[str, Any], memory: str, folder: Path
) -> None:
    """Write reproduce.json into the output folder of a job, where its plan is already, and let the card name it.

    record: of the run, as it was saved. opening: arguments of `open_subject`.
    """
    request = describe_request(job, subject, opening, memory)
    plan = load_plan(folder)
    made = make_reproduce_file(subject, job.prompts, job.columns, job.recipe, request, record, plan)
    write_reproduce_file(made, folder)
    write_atomic(folder / "README.md", render_model_card(record, reproducible=True))


def describe_request(job: Job, subject: Subject, opening: Mapping[str, Any], memory: str) -> Request:
    """Return what was asked for beside model, prompts and recipe."""
    chat = subject.chat
    return Request(
        form=job.form,
        pick=job.pick,
        force=job.force,
        memory=memory,
        thinking=chat.thinking,
        template=chat.template,
        now=chat.now,
        **{key: opening[key] for key in OPTIONS if key in opening},
    )
