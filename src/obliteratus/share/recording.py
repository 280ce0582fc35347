"""Write down what a run was asked to do and what came out, so that it can be done again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from obliteratus.core.results import Run
from obliteratus.core.run_folder import write_atomic
from obliteratus.core.settings import Recipe
from obliteratus.core.types import PromptSet, Subject
from obliteratus.excise.plan import load_plan
from obliteratus.rebirth.model_card import render_model_card
from obliteratus.share.reproduce_file import Request, make_reproduce_file, write_reproduce_file

OPTIONS = ("dtype", "quantize", "device", "trust_remote_code")
"""Arguments of `open_subject` that are recorded as they are."""


def describe_request(subject: Subject, opening: Mapping[str, Any], asked: tuple[str, str, bool, str | None]) -> Request:
    """Return what was asked for beside model, prompts and recipe.

    opening: arguments of `open_subject`. asked: form, pick, force and memory, as in `Request`.
    """
    chat = subject.chat
    form, pick, force, memory = asked
    known = {key: opening[key] for key in OPTIONS if key in opening}
    return Request(
        form=form,
        pick=pick,
        force=force,
        memory=memory,
        thinking=chat.thinking,
        template=chat.template,
        now=chat.now,
        **known,
    )


def write_reproduction(
    subject: Subject,
    prompts: PromptSet,
    columns: str | Mapping[str, str],
    recipe: Recipe,
    request: Request,
    record: Run,
    folder: Path,
) -> None:
    """Write reproduce.json into the output folder of a run, where its plan is already, and let the card name it.

    columns: of the prompts. recipe: as it was asked for. record: of the run, as it was saved.
    """
    made = make_reproduce_file(subject, prompts, columns, recipe, request, record, load_plan(folder))
    write_reproduce_file(made, folder)
    write_atomic(folder / "README.md", render_model_card(record, reproducible=True))
