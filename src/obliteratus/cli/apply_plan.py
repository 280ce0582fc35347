"""Apply a saved plan to a model, and say what was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from obliteratus.cli.apply_gguf import apply_to_gguf, check_loads_nothing
from obliteratus.core.choices import GGUF_FORMS, Form
from obliteratus.core.clock import Clock
from obliteratus.core.results import Run
from obliteratus.core.run_folder import (
    check_disk,
    check_free,
    partial_folder,
    publish,
    workspace,
)
from obliteratus.excise.live.hooks import applied
from obliteratus.excise.plan import check_fits, load_plan, load_samples, plan_digest
from obliteratus.rebirth.gguf import is_gguf
from obliteratus.rebirth.headline import describe_headline
from obliteratus.rebirth.llama_cpp import ADAPTER_OPTIONS
from obliteratus.rebirth.run_page import read_run
from obliteratus.rebirth.save import check_form, default_form, estimate_saved_bytes, write_output
from obliteratus.summon.fingerprint import fingerprint_files
from obliteratus.summon.load import open_subject


def apply_plan(
    folder: Path, model: str, out: Path, form: str, opening: dict[str, Any], clock: Clock, base: str = ""
) -> dict[str, Any]:
    """Load a plan, check that it fits the model, save the edited model, and return its record."""
    form = form or default_form(model)
    check_form(form, base, model)
    plan, record = load_plan(folder), read_run(folder)
    if is_gguf(model) and form in GGUF_FORMS:
        check_loads_nothing(opening)
        return apply_to_gguf((plan, load_samples(folder), record), model, out, form, clock)
    check_free(out)
    with clock.time("SUMMON"):
        subject = open_subject(model, **opening)
    check_fits(subject, plan)
    check_disk(out, estimate_saved_bytes(subject, cast(Form, form), base), partial_folder(out))
    identity = {"plan": plan_digest(plan), "model": model, "form": form, "base": base}
    with workspace(out, identity | fingerprint_files(model), resume=True) as partial:
        with applied(subject, plan):
            pass  # fails here, before anything is written, if a site cannot be edited
        with clock.time("REBIRTH"):
            saved = write_output(subject, plan, record, partial, cast(Form, form), base=base)
        publish(partial, out)
    return saved.model_dump(mode="json")


def show_applied(saved: dict[str, Any], out: Path, json: bool) -> None:
    """Print the record of an applied plan, or where it was saved and what its scores are."""
    from obliteratus.cli.terminal import say, show_json

    if json:
        show_json(saved)
        return
    run = Run.model_validate(saved)
    form, file = run.saved["form"], run.saved.get("file", "")
    say(f"{out} ({form})", "Saved")
    say(
        f"As measured when the plan was made: {describe_headline(run)}" if run.after else "The plan was applied.",
        "Done",
    )
    place = out / file if file and out.is_dir() else out
    if form in ("lora-gguf", "control-vector"):
        say(f"llama-cli -m MODEL.gguf {ADAPTER_OPTIONS[form]} {place} talks to it in llama.cpp.", "Next")
        return
    say(f"obliteratus verify {place} --against {run.source['id']} measures the edited model here.", "Next")
