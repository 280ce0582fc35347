"""Rows of numbers that may outgrow the memory budget: they then lie in a temporary file without a name."""

from __future__ import annotations

import os
import tempfile

import torch
from torch import Tensor

from obliteratus.core.shapes import Float, Int
from obliteratus.core.types import Subject
from obliteratus.inference.memory import free_memory
from obliteratus.weights.safetensors_io import read_at, tensor_bytes

# Share of the free memory that rows may take. Half of it goes to batches, and DISTILL needs copies of some rows.
MEMORY_SHARE = 0.25


class SpilledRows:
    """A tensor [rows, width] in a file. A range of neighboring rows is read and written in one go.

    The file lies in the system's folder for temporary files (TMPDIR). Raises OSError if the disk is full.
    """

    device = torch.device("cpu")

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        self.width, self.dtype = width, dtype
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 – it lives as long as this object does
        self._row_bytes = width * dtype.itemsize

    def __getitem__(self, rows: Int[Tensor, " *any"]) -> Float[Tensor, "*any width"]:
        """Read rows; those between the first and the last are read along."""
        first, last = int(rows.min()), int(rows.max())
        values = torch.empty(last - first + 1, self.width, dtype=self.dtype)
        if read_at(self._file.fileno(), tensor_bytes(values), first * self._row_bytes) < values.nbytes:
            raise ValueError(f"rows {first} to {last} were never written")
        return values[rows - first]

    def __setitem__(self, rows: Int[Tensor, " n"], values: Float[Tensor, "n width"]) -> None:
        """Write rows, which must rise without a gap."""
        remaining = tensor_bytes(values.to(self.dtype))
        offset = int(rows[0]) * self._row_bytes
        while len(remaining):
            written = os.pwrite(self._file.fileno(), remaining, offset)
            remaining, offset = remaining[written:], offset + written


def allocate_rows(subject: Subject, rows: int, width: int, dtype: torch.dtype) -> Tensor | SpilledRows:
    """Return storage for so many rows: in memory if they take at most a quarter of what is free, else in a file."""
    if rows * width * dtype.itemsize <= MEMORY_SHARE * free_memory(subject):
        return torch.empty(rows, width, dtype=dtype)
    return SpilledRows(width, dtype)
