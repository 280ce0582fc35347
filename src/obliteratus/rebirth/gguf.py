"""What is saved for llama.cpp: a GGUF file with the plan in it, a LoRA file, or a control vector."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from obliteratus.core.errors import UserError
from obliteratus.core.results import Run
from obliteratus.core.run_folder import check_disk, lock_folder, write_atomic
from obliteratus.core.types import Plan, Subject
from obliteratus.excise.bake.gguf import bake_into_gguf
from obliteratus.excise.bake.gguf_adapter import (
    choose_architecture,
    save_control_vector,
    save_lora_for_file,
    save_lora_for_subject,
)
from obliteratus.excise.bake.gguf_checks import check_gguf_fits
from obliteratus.excise.bake.gguf_names import GgufModel
from obliteratus.excise.plan import save_plan
from obliteratus.rebirth.llama_cpp import write_loading_files
from obliteratus.rebirth.model_card import render_model_card
from obliteratus.summon.model_samples import ModelSamples, sample_model
from obliteratus.weights.gguf_io import read_gguf
from obliteratus.weights.rewrite import explain_full_disk, hash_file, remove_unfinished_files
from obliteratus.weights.sources import locate

LOCK = "lock"
FILES: Mapping[str, str] = {"lora-gguf": "adapter.gguf", "control-vector": "control-vector.gguf"}


def is_gguf(model: str) -> bool:
    """Return whether a source names a GGUF file by its ending."""
    return model.endswith(".gguf")


def open_gguf_model(source: str) -> GgufModel:
    """Return the GGUF file that a source names. Raises UserError if it is none, or not whole."""
    origin = locate(source)
    if not origin.gguf:
        raise UserError(
            f"{source} is not a GGUF file, which --save gguf edits; apply the plan to one of the same model: "
            "obliteratus apply PLAN model.gguf"
        )
    return GgufModel(read_gguf(Path(origin.path) / origin.gguf))


def estimate_gguf_bytes(form: str, source: str) -> int:
    """Return the bytes to allow for: the source's, and some for tensors in larger types, or an adapter's."""
    return int(1.2 * open_gguf_model(source).file.path.stat().st_size) if form == "gguf" else 10**8


def write_for_subject(subject: Subject, plan: Plan, folder: Path, form: str) -> dict[str, Any]:
    """Write one of `GGUF_FORMS` and how to load it into a folder, and return what run.json records of it."""
    source = subject.source.id
    if is_gguf(source):
        return write_for_file(open_gguf_model(source), plan, sample_model(subject), folder, form)
    if form == "gguf":
        open_gguf_model(source)  # raises: it is none
    target = folder / FILES[form]
    if form == "lora-gguf":
        notes: dict[str, Any] = {"adapter": save_lora_for_subject(subject, plan, target)}
    else:
        vector = save_control_vector(choose_architecture(subject), subject.n_layers, plan, target)
        notes = {"control_vector": vector}
    return notes | {"file": target.name, "loading": write_loading_files(folder, form, target.name, source)}


def write_for_file(
    model: GgufModel, plan: Plan, samples: ModelSamples, folder: Path, form: str, name: str = "", prefix: str = ""
) -> dict[str, Any]:
    """Do the same for a GGUF file alone, without a model in memory. name: of the new file; the default is the form's.

    Raises UserError if the file is of another model, or cannot hold the plan in this form.
    """
    check_gguf_fits(model, plan, samples, biases=form == "gguf")
    target = folder / (name or FILES.get(form, model.file.path.name))
    if form == "gguf":
        notes = bake_into_gguf(model, plan, target)
    elif form == "lora-gguf":
        notes = {"adapter": save_lora_for_file(model, plan, target)}
    else:
        notes = {"control_vector": save_control_vector(model.file.architecture, model.n_layers, plan, target)}
    base = str(model.file.path.absolute())
    return notes | {
        "file": target.name,
        "loading": write_loading_files(folder, form, target.name, base, prefix),
    }


# ------------------------------------------------------------------------------------- without a model in memory
def save_as_folder(model: GgufModel, plan: Plan, samples: ModelSamples, run: Run, folder: Path, form: str) -> Run:
    """Write a GGUF form, its record, the plan and a model card into a folder. Raises UserError as `write_for_file`."""
    remove_unfinished_files(folder)
    with explain_full_disk(folder):
        notes = write_for_file(model, plan, samples, folder, form)
        save_plan(plan, folder, samples)
        run = run.model_copy(
            update={
                "status": "done",
                "saved": {**_origin(run), "form": form, **notes, "files": _describe(folder, notes)},
            }
        )
        (folder / "README.md").write_text(render_model_card(run), encoding="utf-8")
        write_atomic(folder / "run.json", run.model_dump_json(indent=1))
    return run


def _describe(folder: Path, notes: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return ``bytes`` and ``sha256`` of each file by its name. That of an edited model was taken as it was written."""
    known = {notes["file"]: notes["sha256"]} if "sha256" in notes else {}
    files = [path for path in sorted(folder.iterdir()) if path.name != LOCK]
    return {
        path.name: {"bytes": path.stat().st_size, "sha256": known.get(path.name) or hash_file(path)} for path in files
    }


def _origin(run: Run) -> dict[str, Any]:
    """Return what the plan's own record says of its model's card, which holds for a file of the model too."""
    return {key: value for key, value in run.saved.items() if key == "base_model"}


def check_file_free(out: Path) -> None:
    """Raise UserError unless a GGUF file and its record can be written here."""
    for path in (out, *_beside(out)):
        if path.exists() or path.is_symlink():
            raise UserError(f"{path} exists; name another file with --out, or remove it")
    if not out.absolute().parent.is_dir():
        raise UserError(f"{out}: there is no folder {out.parent}; make it, or name another file with --out")


def _beside(out: Path) -> tuple[Path, ...]:
    return tuple(out.with_name(f"{out.stem}.{name}") for name in ("json", "Modelfile", "llama-cpp.sh"))


def save_as_file(model: GgufModel, plan: Plan, samples: ModelSamples, run: Run, out: Path, form: str = "gguf") -> Run:
    """Write a GGUF form to a file, its record to NAME.json, and how to load it to NAME.Modelfile and NAME.llama-cpp.sh.

    The file comes last and is renamed into place, so that it is whole if it is there. Raises UserError as
    `write_for_file`, or if a file is in use.
    """
    check_file_free(out)
    check_disk(out, int(1.2 * model.file.path.stat().st_size) if form == "gguf" else 10**8)
    prefix, aside = f"{out.stem}.", out.with_name(f".{out.stem}.partial")
    aside.mkdir(exist_ok=True)
    try:
        with lock_folder(aside), explain_full_disk(out):
            _clear(aside)  # a killed run may have left something
            notes = write_for_file(model, plan, samples, aside, form, out.name, prefix)
            files = _describe(aside, notes)
            run = run.model_copy(
                update={"status": "done", "saved": {**_origin(run), "form": form, **notes, "files": files}}
            )
            record = aside / f"{prefix}json"
            record.write_text(json.dumps(run.model_dump(mode="json"), indent=1), encoding="utf-8")
            for name in (*notes["loading"], record.name, out.name):
                (aside / name).replace(out.with_name(name))
    finally:
        _remove(aside)
    return run


def _clear(aside: Path) -> None:
    for path in aside.iterdir():
        if path.name != LOCK:
            path.unlink()


def _remove(aside: Path) -> None:
    _clear(aside)
    (aside / LOCK).unlink(missing_ok=True)
    aside.rmdir()
