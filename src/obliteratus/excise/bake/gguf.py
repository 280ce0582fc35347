"""A plan baked into a GGUF file, tensor by tensor. No model is built: the plan and the file hold all that is needed.

Input-side permutations of a file's rows, as of llama's queries and keys, need no care: an edit of a reader acts on its
columns, and one of a writer on rows that no converter permutes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from obliteratus.core.progress import note, progress
from obliteratus.core.types import Change, Plan, Shift, Site
from obliteratus.excise.bake.gguf_names import HEAD, TABLE, GgufModel
from obliteratus.excise.bake.gguf_numbers import Rewriter, can_split_columns, can_split_rows
from obliteratus.excise.bake.quantized import RequantizationLosses
from obliteratus.excise.change import (
    apply_change,
    apply_to_bias,
    fill_donor_means_from,
    needs_bias,
    needs_weight,
    select_changes,
)
from obliteratus.weights.gguf_blocks import choose_written_type, decode
from obliteratus.weights.gguf_io import GgufFile, GgufTensor, StoredBytes
from obliteratus.weights.rewrite_gguf import Bytes, rewrite_gguf

CHUNK = 1 << 21  # numbers edited at once: 8 MB in fp32, of which an edit holds about eight
F32 = GGMLQuantizationType.F32


def bake_into_gguf(model: GgufModel, plan: Plan, target: Path) -> dict[str, Any]:
    """Write the file with the plan in it, and return what run.json records of it. Call `check_gguf_fits` first.

    The file appears whole or not at all. Raises UserError if it cannot be written, or if the source is truncated.
    """
    losses = RequantizationLosses()
    edits = edit_gguf_tensors(model, plan, losses)
    with progress("REBIRTH edits tensors", len(edits.bytes)) as advance:
        counted = {name: partial(_count, make, advance) for name, make in edits.bytes.items()}
        sha = rewrite_gguf(model.file, target, counted, edits.changed)
    added = edits.changed.keys() - model.file.tensors.keys()
    retyped = {name: tensor.type.name for name, tensor in edits.changed.items() if name not in added}
    if retyped:
        types = ", ".join(sorted({f"{model.file.tensors[name].type.name} as {to}" for name, to in retyped.items()}))
        note("REBIRTH", f"{len(retyped)} tensors are of a type that cannot be written, and are stored larger: {types}")
    kinds = Counter(model.file.tensors[name].type.name for name in edits.bytes.keys() - added)
    counts = {"edited": len(edits.bytes) - len(added), "added": len(added)}
    record: dict[str, Any] = {"onto": {"name": str(model.file.path), "tensors": counts, "types": dict(kinds)}}
    record |= {"retyped": retyped} if retyped else {}
    return record | ({"requantized": losses.summary()} if losses.by_path else {}) | {"sha256": sha}


def _count(make: Bytes, advance: Any) -> Iterator[StoredBytes]:
    yield from make()
    advance(1)


# ------------------------------------------------------------------------------------- edited tensors
@dataclass
class GgufEdits:
    """What becomes of a file's tensors, by their names."""

    bytes: dict[str, Bytes] = field(default_factory=dict)
    """New bytes, each computed when it is written."""
    changed: dict[str, GgufTensor] = field(default_factory=dict)
    """Shape and type of tensors that are new or change their type."""


def edit_gguf_tensors(model: GgufModel, plan: Plan, losses: RequantizationLosses) -> GgufEdits:
    """Return all that a plan changes in the file. Call `check_gguf_fits` first."""
    edits = GgufEdits()
    for changes in plan.by_site().values():
        site = changes[0].site
        if not all(isinstance(change, Shift) for change in changes):
            for tensor in model.find_tensors(site):
                _edit_tensor(model, tensor, changes, losses, edits)
        if model.find_bias(site) in model.file.tensors or any(map(needs_bias, changes)):
            _edit_bias(model, changes, edits)
    return edits


def _edit_tensor(
    model: GgufModel, tensor: GgufTensor, changes: Sequence[Change], losses: RequantizationLosses, edits: GgufEdits
) -> None:
    """Add the edited matrix. Where one tensor is embedding and head and only one of the two is edited, the other stays
    as it is: the head becomes a tensor of its own."""
    name, kind = tensor.name, choose_written_type(tensor.type)
    matrix = StoredMatrix(model.file, tensor, changes, losses)
    if name == TABLE and model.tied:
        head = replace(tensor, name=HEAD)
        if changes[0].site.part != "embed":
            edits.changed[HEAD], edits.bytes[HEAD] = replace(head, type=kind), matrix.write
            return
        if HEAD not in edits.changed:
            edits.changed[HEAD], edits.bytes[HEAD] = head, partial(_copy, model.file, tensor)
    if kind != tensor.type:
        edits.changed[name] = replace(tensor, type=kind)
    edits.bytes[name] = matrix.write


def _copy(file: GgufFile, tensor: GgufTensor) -> Iterator[StoredBytes]:
    for rows in _split(prod(tensor.shape[:-1]), tensor.shape[-1]):
        yield file.read_rows(tensor, rows)


def _split(rows: int, columns: int, multiple: int = 1) -> Iterator[slice]:
    """Yield slices of rows with about `CHUNK` numbers each, in multiples."""
    step = max(CHUNK // max(columns, 1) // multiple, 1) * multiple
    yield from (slice(start, min(start + step, rows)) for start in range(0, rows, step))


@dataclass(frozen=True)
class StoredMatrix:
    """A tensor of the file that is edited: one matrix, or one for each expert."""

    file: GgufFile
    tensor: GgufTensor
    changes: Sequence[Change]
    losses: RequantizationLosses

    def write(self) -> Iterator[StoredBytes]:
        """Yield the edited bytes, piece by piece."""
        site = self.changes[0].site
        if not site.stacked:
            yield from self._write_matrix(self.changes, 0)
            return
        changes = self._filled
        for expert in range(self.tensor.shape[0]):
            own = select_changes(changes, replace(site, expert=expert))
            yield from self._write_matrix(own, expert) if own else [self._read(expert, slice(None))]

    @cached_property
    def _filled(self) -> Sequence[Change]:
        return fill_donor_means_from(self.changes, self._read_expert, lambda site: None)

    def _read_expert(self, site: Site) -> Tensor:
        assert site.expert is not None, "a donor is one expert"
        return decode(self._read(site.expert, slice(None)), self.tensor.type)

    def _read(self, expert: int, rows: slice) -> StoredBytes:
        first, last, _ = rows.indices(self.tensor.shape[-2])
        begin = expert * self.tensor.shape[-2]
        return self.file.read_rows(self.tensor, slice(begin + first, begin + last))

    def _write_matrix(self, changes: Sequence[Change], expert: int) -> Iterator[StoredBytes]:
        rows, columns = self.tensor.shape[-2:]
        rewriter = Rewriter(self.tensor.type, changes, self.losses, self.tensor.name)
        if can_split_rows(changes):
            yield from (rewriter.rewrite(self._read(expert, part)) for part in _split(rows, columns))
        elif can_split_columns(changes):
            yield _rewrite_columns(rewriter, self._read(expert, slice(None)), columns)
        else:
            yield rewriter.rewrite(self._read(expert, slice(None)))


def _rewrite_columns(rewriter: Rewriter, stored: StoredBytes, columns: int) -> StoredBytes:
    """Return the edited bytes of a matrix, of which some columns are held as numbers at a time."""
    block, size = GGML_QUANT_SIZES[rewriter.kind]
    new_block, new_size = GGML_QUANT_SIZES[rewriter.written]
    written = stored if rewriter.written == rewriter.kind else None
    if written is None:
        written = np.empty((len(stored), columns // new_block * new_size), np.uint8)
    for part in _split(columns, len(stored), max(block, new_block)):
        old = slice(part.start // block * size, part.stop // block * size)
        new = slice(part.start // new_block * new_size, part.stop // new_block * new_size)
        written[:, new] = rewriter.rewrite(np.ascontiguousarray(stored[:, old]))
    return written


# --------------------------------------------------------------------------------------------- biases
def _edit_bias(model: GgufModel, changes: Sequence[Change], edits: GgufEdits) -> None:
    name = model.find_bias(changes[0].site)
    matrix = model.find_tensors(changes[0].site)[0]
    kept = model.file.tensors.get(name)
    if kept is None or kept.type != F32:
        edits.changed[name] = GgufTensor(name, kept.shape if kept else matrix.shape[:-1], F32)
    edits.bytes[name] = partial(_write_bias, model, changes, matrix, kept)


def _write_bias(
    model: GgufModel, changes: Sequence[Change], matrix: GgufTensor, kept: GgufTensor | None
) -> Iterator[StoredBytes]:
    """Yield the bias after all changes in fp32, expert by expert."""
    site, file = changes[0].site, model.file
    stored = None if kept is None else decode(file.read_rows(kept), kept.type)
    for expert in range(matrix.shape[0] if site.stacked else 1):
        own = select_changes(changes, replace(site, expert=expert)) if site.stacked else changes
        bias = None if stored is None else stored[expert]
        weight = decode(file.read_rows(matrix), matrix.type) if needs_weight(own) else None
        for change in own:
            bias = apply_to_bias(change, bias, weight)
            weight = None if weight is None else apply_change(change, weight)
        bias = torch.zeros(matrix.shape[-2]) if bias is None else bias
        yield bias.float().contiguous().numpy().view(np.uint8)
