"""Do what `obliteratus apply` asks for where the model is a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from obliteratus.core.clock import Clock
from obliteratus.core.errors import UserError
from obliteratus.core.results import Run
from obliteratus.core.run_folder import check_disk, check_free, partial_folder, publish, workspace
from obliteratus.core.types import Plan
from obliteratus.excise.plan import plan_digest
from obliteratus.rebirth.gguf import estimate_gguf_bytes, is_gguf, open_gguf_model, save_as_file, save_as_folder
from obliteratus.summon.fingerprint import fingerprint_files
from obliteratus.summon.model_samples import ModelSamples


def check_loads_nothing(opening: Mapping[str, Any]) -> None:
    """Raise UserError for options of loading a model where none is loaded."""
    for option, usual in (("dtype", "auto"), ("device", "auto"), ("quantize", "")):
        if opening.get(option, usual) != usual:
            raise UserError(f"--{option}: a GGUF file is edited in its own types and no model is loaded; leave it out")


def apply_to_gguf(
    saved: tuple[Plan, ModelSamples, Run], model: str, out: Path, form: str, clock: Clock
) -> dict[str, Any]:
    """Apply a plan to a GGUF file without loading a model, and return the record.

    saved: the plan, what it knows of its model, and its record. The output is a folder, or a file if its name ends in
    .gguf. Raises UserError if the file cannot hold the plan, or the output exists.
    """
    base, (plan, samples, record) = open_gguf_model(model), saved
    record = record.model_copy(update={"source": {**record.source, "id": model}})
    if is_gguf(str(out)):
        with clock.time("REBIRTH"):
            return save_as_file(base, plan, samples, record, out, form).model_dump(mode="json")
    check_free(out)
    check_disk(out, estimate_gguf_bytes(form, model), partial_folder(out))
    identity = {"plan": plan_digest(plan), "model": model, "form": form}
    with workspace(out, identity | fingerprint_files(model), resume=True) as partial:
        with clock.time("REBIRTH"):
            written = save_as_folder(base, plan, samples, record, partial / "output", form)
        publish(partial, out)
    return written.model_dump(mode="json")
