"""A plan baked into a checkpoint's own files, file by file and tensor by tensor.

What the plan does not touch stays as it is, byte for byte. A bake that was killed resumes behind its last whole file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from obliteratus.core.progress import progress
from obliteratus.core.types import Change, Plan, Shift, Site, digest_of
from obliteratus.excise.bake.base_checkpoint import BaseCheckpoint, find_new_bias_sites
from obliteratus.excise.bake.tensors import bake_in_pieces, edit_biases, edit_parameter, find_bias_switches
from obliteratus.excise.change import edit_module_weight, fill_donor_means_from, needs_bias, select_changes
from obliteratus.excise.plan import plan_digest
from obliteratus.weights.checkpoint import Checkpoint
from obliteratus.weights.config_entries import change_config, complete_config, find_text_key
from obliteratus.weights.matrices import convert_to_stored, has_bias, read_weight
from obliteratus.weights.portable import read_json, write_json
from obliteratus.weights.rewrite import FinishedFiles, copy_file, rewrite_file
from obliteratus.weights.safetensors_io import Pieces
from obliteratus.weights.sources import INDEX, WHOLE


def bake_into_checkpoint(base: BaseCheckpoint, plan: Plan, folder: Path) -> dict[str, Any]:
    """Write the edited weights, their index and the configuration into ``folder``.

    Files that an interrupted bake of the same plan into the same checkpoint left there are reused. Call
    `explain_unbakeable` first. Returns what run.json records of it. Raises UserError where a source file was altered
    or a file cannot be written.
    """
    files, edits = base.files, edit_tensors(base, plan)
    finished = FinishedFiles(folder, _identify(files, plan))
    copies = 0
    with progress("REBIRTH writes files, MB", sum(map(_megabytes, files.shards))) as advance:
        for file in files.shards:
            own, added = _edits_of_file(files, edits, file)
            write = partial(rewrite_file, file, edits=own, added=added) if own else partial(copy_file, file)
            finished.write(file.name, partial(write, expected_hash=files.recorded_hash(file)))
            copies += not own
            advance(_megabytes(file))
    _write_index(files, edits, folder)
    rewritten = _write_config(base, edits.config, folder)
    counts = {"edited": len(edits.tensors.keys() - edits.added.keys()), "added": len(edits.added)}
    record: dict[str, Any] = {
        "onto": {"name": files.name, "files": len(files.shards), "copied": copies, "tensors": counts}
    }
    record |= {"rewritten": {"config.json": rewritten}} if rewritten else {}
    return record | ({"base": files.name} if base.quantized else {})


def _megabytes(file: Path) -> int:
    return -(-file.stat().st_size // 10**6)


def _identify(files: Checkpoint, plan: Plan) -> str:
    """Return a digest of the plan and of the files, as far as their sizes, times and headers tell."""
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files.shards]
    headers = [header.raw.decode(errors="replace") for header in files.shards.values()]
    return digest_of([files.name, plan_digest(plan), stats, headers])


# ------------------------------------------------------------------------------------- edited tensors
@dataclass
class TensorEdits:
    """What becomes of a checkpoint's tensors, by their stored names."""

    tensors: dict[str, Pieces] = field(default_factory=dict)
    """New numbers, each computed when it is written."""
    added: dict[str, Tensor] = field(default_factory=dict)
    """Shape and dtype of those that are not stored yet."""
    config: dict[str, bool] = field(default_factory=dict)
    """Entries that the configuration must get."""


def edit_tensors(base: BaseCheckpoint, plan: Plan) -> TensorEdits:
    """Return all that a plan changes in the files. Call `explain_unbakeable` first."""
    edits = TensorEdits(config=dict.fromkeys(find_bias_switches(base.subject, plan).values(), True))
    by_site = plan.by_site()
    for site in find_new_bias_sites(base.subject, plan):
        _add_zero_bias(base, site, edits)
    if base.tied is not None and any(name in base.tied for name in by_site):
        _untie_head(base, base.tied, edits)
    fill = _cache_donor_means(base, by_site)
    for changes in by_site.values():
        in_parts = base.find_expert_names(changes[0].site)
        edits.tensors |= _edit_experts(base, changes, fill) if in_parts else _edit_site(base, changes)
    return edits


def _add_zero_bias(base: BaseCheckpoint, site: Site, edits: TensorEdits) -> None:
    weight = base.files.meta_tensor(str(base.find_stored_name(site.parameter)))
    name = base.choose_bias_name(site)
    if not base.files.holds(name):
        edits.added[name] = weight[:, 0] if site.layout == "linear" else weight[0]
        edits.tensors[name] = partial(_write_zeros, edits.added[name])


def _write_zeros(like: Tensor) -> Iterator[Tensor]:
    yield torch.zeros(like.shape, dtype=like.dtype)


def _untie_head(base: BaseCheckpoint, tied: tuple[str, str], edits: TensorEdits) -> None:
    """Store embedding and head separately, since the plan edits one of them and the other stays as it was."""
    edits.config["tie_word_embeddings"] = False
    table, head = base.find_stored_name(tied[0]), base.choose_stored_name(tied[1])
    if table is not None and not base.files.holds(head):
        edits.added[head] = base.files.meta_tensor(table)
        edits.tensors[head] = partial(_write_stored, base.files, table)


def _write_stored(files: Checkpoint, name: str) -> Iterator[Tensor]:
    yield files.read(name)


def _edit_site(base: BaseCheckpoint, changes: Sequence[Change]) -> Mapping[str, Pieces]:
    """Return the edited matrix, and its bias if it has one or gets one."""
    site = changes[0].site
    edited: dict[str, Pieces] = {}
    if not all(isinstance(change, Shift) for change in changes):
        edited[base.choose_stored_name(site.parameter)] = partial(_write_matrix, base, changes)
    if base.files.stored_name(f"{site.path}.{site.bias}") or any(map(needs_bias, changes)):
        edited[base.choose_bias_name(site)] = partial(_write_bias, base, changes)
    return edited


def _write_matrix(base: BaseCheckpoint, changes: Sequence[Change]) -> Iterator[Tensor]:
    """Edit the stored matrix in fp32 and round it once to its stored dtype.

    The loaded model's dtype may be coarser, and an edit of what was rounded before would round twice; or finer, and
    the file would grow without saying more.
    """
    site = changes[0].site
    stored = base.open_matrix(site)
    base.check_same_matrix(site, stored)
    yield from bake_in_pieces(edit_parameter(stored, changes))


def _write_bias(base: BaseCheckpoint, changes: Sequence[Change]) -> Iterator[Tensor]:
    site = changes[0].site
    stored = base.open_matrix(site)
    if all(isinstance(change, Shift) for change in changes):  # then `_write_matrix` does not check the matrix
        base.check_same_matrix(site, stored)
    bias = edit_biases(stored, changes)
    assert bias is not None, "asked for only where there is one"
    yield bias.to(stored.get_parameter(site.bias if has_bias(stored, site) else site.weight).dtype)


# ---------------------------------------------------------------------------- experts stored one by one
FillDonors = Callable[[str], Sequence[Change]]
"""Returns the changes of a stack, by its parameter, with the mean of their donors filled in."""


def _cache_donor_means(base: BaseCheckpoint, by_site: Mapping[str, Sequence[Change]]) -> FillDonors:
    """Keep the means of one stack only: the files hold a stack's matrices in a row."""

    def fill(parameter: str) -> Sequence[Change]:
        return fill_donor_means_from(by_site[parameter], partial(_read_expert, base), lambda site: None)

    return lru_cache(maxsize=1)(fill)


def _edit_experts(base: BaseCheckpoint, changes: Sequence[Change], fill: FillDonors) -> Mapping[str, Pieces]:
    """Return the edited matrices of a stack whose experts are stored one by one.

    Where a reading expert's matrix is itself stored in parts, each part is edited alone, as each of its outputs is.
    """
    edited: dict[str, Pieces] = {}
    for expert, names in enumerate(base.find_expert_names(changes[0].site)):
        site = replace(changes[0].site, expert=expert)
        if select_changes(changes, site):
            edited |= {name: partial(_write_expert, base, fill, site, name) for name in names}
    return edited


def _write_expert(base: BaseCheckpoint, fill: FillDonors, site: Site, name: str) -> Iterator[Tensor]:
    matrix = base.files.read(name)
    parts = base.find_expert_names(site)[site.expert or 0]
    start = sum(len(base.files.meta_tensor(part)) for part in parts[: parts.index(name)])
    base.check_same_expert(site, matrix, start)
    module, alone = _stack_of_one(matrix, site)
    own = [replace(change, site=alone) for change in select_changes(fill(site.parameter), site)]
    yield convert_to_stored(edit_module_weight(module, own), alone, matrix)


def _read_expert(base: BaseCheckpoint, site: Site) -> Tensor:
    """Return one expert's matrix as `read_weight` does."""
    assert site.expert is not None, "a donor is one expert"
    (name,) = base.find_expert_names(site)[site.expert]
    return read_weight(*_stack_of_one(base.files.read(name), site))


def _stack_of_one(matrix: Tensor, site: Site) -> tuple[nn.Module, Site]:
    """Return a stack that holds this matrix alone, and its site."""
    module = nn.Module()
    module.register_parameter(site.weight, nn.Parameter(matrix[None], requires_grad=False))
    return module, replace(site, expert=0)


# ----------------------------------------------------------------------------------------------- files
def _edits_of_file(files: Checkpoint, edits: TensorEdits, file: Path) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Return the edits of the tensors in a file, and the tensors added to it: the last file gets all new ones."""
    added = edits.added if file == _last(files) else {}
    stored = files.shards[file].entries
    return {name: make for name, make in edits.tensors.items() if name in stored or name in added}, added


def _last(files: Checkpoint) -> Path:
    return list(files.shards)[-1]


def _write_index(files: Checkpoint, edits: TensorEdits, folder: Path) -> None:
    last, source = _last(files), files.folder / INDEX
    if last.name == WHOLE:
        return
    if not edits.added:
        copy_file(source, folder / INDEX)
        return
    index = json.loads(source.read_text(encoding="utf-8"))
    index["weight_map"] |= dict.fromkeys(edits.added, last.name)
    if "total_size" in index.get("metadata", {}):
        index["metadata"]["total_size"] += sum(like.nbytes for like in edits.added.values())
    write_json(folder / INDEX, index)


def _write_config(base: BaseCheckpoint, changes: Mapping[str, bool], folder: Path) -> str:
    """Copy the configuration with the edit's entries and those that release 4 reads, and return why it is another file.

    Keys that transformers does not know survive.
    """
    source = base.files.folder / "config.json"
    data = read_json(source)
    complete = complete_config(data)
    reasons = [f"the edit needs other values of {', '.join(sorted(changes))}"] if changes else []
    reasons += ["transformers 4 reads rotary embeddings by older names"] if complete != data else []
    if reasons:
        write_json(folder / "config.json", change_config(complete, find_text_key(base.subject.model.config), changes))
    else:
        copy_file(source, folder / "config.json")
    return "; ".join(reasons)
