"""A plan baked onto a checkpoint's own files, one after the other and tensor by tensor: what the plan does not touch
stays as it is, byte for byte, and a bake that was killed goes on behind the last whole file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from obliteratus.core.progress import progress
from obliteratus.core.types import Plan, digest_of
from obliteratus.excise.bake.base_files import BaseCheckpoint
from obliteratus.excise.bake.edited_tensors import TensorEdits, edit_tensors
from obliteratus.excise.plan import plan_digest
from obliteratus.weights.checkpoint import Checkpoint
from obliteratus.weights.rewrite import FinishedFiles, copy_file, rewrite_file, write_atomically
from obliteratus.weights.sources import INDEX, WHOLE

# Weights in other forms would be those of the unedited model.
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".npz")
INDICES = ".index.json"
OURS = ("config.json", "README.md", "run.json", "plan.json", "front.json", "front.png")
"""Written anew, or, of an earlier run, no longer true."""


def bake_into_checkpoint(onto: BaseCheckpoint, plan: Plan, folder: Path) -> dict[str, Any]:
    """Weights, index, what else lies beside them, and at last the configuration, in ``folder``; what an interrupted
    bake of the same plan onto the same files left there is used. Returns what run.json says of it.

    `onto.why_not` comes first. UserError where a file was altered, or cannot be written.
    """
    files, edits = onto.files, edit_tensors(onto, plan)
    done = FinishedFiles(folder, _identity(files, plan))
    copies = 0
    with progress("REBIRTH writing", len(files.shards)) as advance:
        for file in files.shards:
            mine, added = _in_file(files, edits, file)
            write = partial(rewrite_file, file, edits=mine, added=added) if mine else partial(copy_file, file)
            done.file(file.name, partial(write, known=files.known_sum(file)))
            copies += not mine
            advance(1)
    _write_index(files, edits, folder)
    _copy_others(files.folder, folder)
    _write_config(files.folder, edits.config, folder)
    counts = {"edited": len(edits.tensors.keys() - edits.added.keys()), "added": len(edits.added)}
    notes: dict[str, Any] = {
        "onto": {"name": files.name, "files": len(files.shards), "copied": copies, "tensors": counts}
    }
    return notes | ({"base": files.name} if onto.quantized else {})


def _identity(files: Checkpoint, plan: Plan) -> str:
    """Of what is written: the plan, and the files as far as their sizes, times and heads tell."""
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files.shards]
    heads = [header.raw.decode(errors="replace") for header in files.shards.values()]
    return digest_of([files.name, plan_digest(plan), stats, heads])


def _in_file(files: Checkpoint, edits: TensorEdits, file: Path) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The edits that a file holds; those that no file has, the last one gets, where one is new to all."""
    added = edits.added if file == _last(files) else {}
    here = files.shards[file].entries
    return {key: make for key, make in edits.tensors.items() if key in here or key in added}, added


def _last(files: Checkpoint) -> Path:
    return list(files.shards)[-1]


def _write_index(files: Checkpoint, edits: TensorEdits, folder: Path) -> None:
    last, source = _last(files), files.folder / INDEX
    if last.name == WHOLE:
        return
    if not edits.added:
        copy_file(source, folder / INDEX)
        return
    index = json.loads(source.read_text())
    index["weight_map"] |= dict.fromkeys(edits.added, last.name)
    if "total_size" in index.get("metadata", {}):
        index["metadata"]["total_size"] += sum(like.nbytes for like in edits.added.values())
    _write_json(folder / INDEX, index)


def _copy_others(source: Path, folder: Path) -> None:
    """Licence, custom code, templates, whatever a tokenizer keeps beside its own file."""
    for file in sorted(source.iterdir()):
        told = file.name.startswith(".") or file.name in OURS or file.name.endswith(INDICES)
        if file.is_file() and not told and file.suffix not in WEIGHTS:
            copy_file(file, folder / file.name)


def _write_config(source: Path, changes: Mapping[str, bool], folder: Path) -> None:
    """As it stands, with what the edit changes: keys that transformers does not know survive."""
    config = json.loads((source / "config.json").read_text())
    if not changes:
        copy_file(source / "config.json", folder / "config.json")
        return
    _write_json(folder / "config.json", config | changes)


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    with write_atomically(path) as out:
        out.write(f"{json.dumps(data, indent=2, ensure_ascii=False)}\n".encode())
