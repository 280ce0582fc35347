"""Edits of a GGUF tensor's rows: read, edited in fp32, and written again in a type of GGML, with the loss measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from obliteratus.core.shapes import Float
from obliteratus.core.types import Change, Edit
from obliteratus.excise.bake.quantized import MIN_SINGULAR_VALUE, RequantizationLoss, RequantizationLosses
from obliteratus.excise.change import apply_change
from obliteratus.weights.gguf_blocks import (
    CODES,
    ZERO_CODES,
    Grid,
    choose_written_type,
    decode,
    encode,
    read_grid,
    write_codes,
)
from obliteratus.weights.gguf_io import StoredBytes
from obliteratus.weights.rounding import carry_errors, correct_errors

CACHED = 1 << 18  # numbers at once where several passes are made over them: 1 MB in fp32 stays in a core's cache
FINE = 256  # levels of Q8_0, whose steps are so fine that an edit changes most codes
# Share of a matrix's squared length that its old steps may fail to reach before blocks get new ones. What a few numbers
# at the ends of blocks miss is made up for by others.
CLIPPED = 1e-3


@dataclass
class Rewriter:
    """Edits the rows of one matrix, in parts that do not depend on each other, and adds up what rounding loses."""

    kind: GGMLQuantizationType
    changes: Sequence[Change]
    losses: RequantizationLosses
    name: str
    written: GGMLQuantizationType = field(init=False)
    """The type that edited rows are written in."""

    def __post_init__(self) -> None:
        self.written = choose_written_type(self.kind)
        self._transposed = self.changes[0].site.layout == "embedding"  # W is [width, tokens], and rows are tokens
        self._along = span_of_directions(self.changes)
        self._shrinks = all(map(_shrinks, self.changes))

    def rewrite(self, stored: StoredBytes) -> StoredBytes:
        """Return the edited rows as bytes."""
        before = decode(stored, self.kind)
        weight = before.T if self._transposed else before
        for change in self.changes:
            weight = apply_change(change, weight)
        edited = (weight.T if self._transposed else weight).contiguous()
        written, lost = self._round(stored, edited)
        self._add_loss(before, edited, written, lost)
        return written

    def _round(self, stored: StoredBytes, edited: Float[Tensor, "rows n"]) -> tuple[StoredBytes, Tensor | None]:
        """Return the rows as bytes, and rounded − edited numbers if they are at hand."""
        if self.written not in CODES:
            return encode(edited, self.written), None
        stored = self._widen(stored, edited) if self.written == self.kind else encode(edited, self.written)
        grid = read_grid(stored, self.written)
        if self._along is not None and grid.levels < FINE:
            return write_codes(stored, self._compensate(grid, edited, self._along), self.written), None
        codes = grid.codes(edited)
        lost = grid.values(codes).sub_(edited)
        if self._along is not None:
            self._correct(grid, edited, self._along, codes, lost)
        return write_codes(stored, codes, self.written), lost

    def _widen(self, stored: StoredBytes, edited: Float[Tensor, "rows n"]) -> StoredBytes:
        """Return the blocks with new steps where the old ones do not reach the edited numbers and new ones come nearer.

        The gguf package has none for k-quants, whose blocks keep theirs.
        """
        if self.kind not in ZERO_CODES or self._shrinks:
            return stored
        grid = read_grid(stored, self.kind)
        if grid.missed(edited) <= CLIPPED * _dot(edited, edited):
            return stored
        block, size = GGML_QUANT_SIZES[self.kind]
        fresh = encode(edited, self.kind)
        numbers = decode(fresh, self.kind), grid.values(grid.codes(edited))
        again, kept = ((values - edited).square().view(-1, block).sum(1) for values in numbers)
        nearer = (again < kept).numpy()[:, None]
        return np.where(nearer, fresh.reshape(-1, size), stored.reshape(-1, size)).reshape(stored.shape)

    def _compensate(self, grid: Grid, edited: Float[Tensor, "rows n"], along: Float[Tensor, "k m"]) -> Tensor:
        """Return the codes [rows, n], uint8, with rounding errors carried along the directions: from row to row, or
        within rows if the directions lie there."""
        lines = edited.T.contiguous() if self._across else edited
        grid = grid.transpose(edited.shape[1]) if self._across else grid
        codes = np.empty(lines.shape, np.uint8)

        def round_rows(values: Tensor, rows: Tensor) -> Tensor:
            part = grid.select(rows)
            found = part.codes(values)
            codes[rows.numpy()] = found.numpy()
            return part.values(found)

        carry_errors(lines, along, round_rows)
        made = torch.from_numpy(codes)
        return made.T.contiguous() if self._across else made

    def _correct(self, grid: Grid, edited: Tensor, along: Float[Tensor, "k m"], codes: Tensor, lost: Tensor) -> None:
        """Change codes and losses [rows, n] so that the losses have next to nothing along the directions."""
        across = self._across
        grid = grid.transpose(edited.shape[1]) if across else grid
        lines, coded, missed = (x.T if across else x for x in (edited, codes, lost))

        def round_rows(added: Tensor, rows: Tensor) -> Tensor:
            wanted, part = lines[rows], grid.select(rows)
            coded[rows] = found = part.codes(wanted + added)
            return part.values(found).sub_(wanted)

        correct_errors(missed, along, round_rows)

    @property
    def _across(self) -> bool:
        """Whether directions lie in the rows of the stored matrix, not in its columns."""
        return self._transposed or self.changes[0].site.role == "reads"

    def _add_loss(self, before: Tensor, edited: Tensor, written: StoredBytes, lost: Tensor | None) -> None:
        if self.written == GGMLQuantizationType.F32:
            return
        sums = torch.zeros(4, dtype=torch.float64)
        step = max(1, CACHED // edited.shape[1])
        for start in range(0, len(edited), step):
            rows = slice(start, start + step)
            missed = decode(written[rows], self.written).sub_(edited[rows]) if lost is None else lost[rows]
            edit = edited[rows] - before[rows]
            pairs = ((missed, missed), (edited[rows], edited[rows]), (edit, edit), (missed, edit))
            sums += torch.tensor([_dot(a, b) for a, b in pairs], dtype=torch.float64)
        self.losses.add(self.name, RequantizationLoss(*sums.tolist()))


def span_of_directions(changes: Sequence[Change]) -> Tensor | None:
    """Return orthonormal rows that span all along which the edits of a matrix remove something; None if there are none.

    A reader's are those of its inputs, a writer's those of its outputs.
    """
    edits = [change for change in changes if isinstance(change, Edit)]
    if not edits:
        return None
    rows = torch.cat([x for edit in edits for x in (edit.basis.double(), edit.along.double())])
    _, sizes, basis = torch.linalg.svd(rows, full_matrices=False)
    independent: Tensor = basis[sizes > MIN_SINGULAR_VALUE * sizes[0]]
    return independent.float()


def _shrinks(change: Change) -> bool:
    """Return whether a change cannot make a matrix longer: it removes a part of it, at right angles to the rest."""
    return isinstance(change, Edit) and change.covectors is None and change.norm == "none" and 0 <= change.strength <= 1


def _dot(a: Tensor, b: Tensor) -> float:
    return float(np.dot(a.reshape(-1).numpy(), b.reshape(-1).numpy()))  # takes half as long as torch's


def can_split_columns(changes: Sequence[Change]) -> bool:
    """Return whether columns of W can be edited apart: outputs of each input are projected and rescaled alone."""
    return all(
        isinstance(c, Edit) and c.site.role == "writes" and c.norm in ("none", "columns") and c.site.span is None
        for c in changes
    )


def can_split_rows(changes: Sequence[Change]) -> bool:
    """Return whether rows of the stored matrix can be edited apart: readers' outputs, and tokens of an embedding."""
    reads = all(isinstance(c, Edit) and c.site.role == "reads" for c in changes)
    return reads or (changes[0].site.layout == "embedding" and can_split_columns(changes))
