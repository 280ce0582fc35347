"""Rows of numbers that outgrow the memory budget: in a file without a name, which is gone when nobody uses it."""

from __future__ import annotations

import os
import tempfile

import torch
from torch import Tensor

from obliteratus.core.shapes import Float, Int
from obliteratus.core.types import Subject
from obliteratus.inference.memory import free_memory
from obliteratus.weights.safetensors_io import read_at, tensor_bytes

# Of what is free, rows may take as much and stay in memory: half goes to batches, and DISTILL wants copies of some.
SHARE = 0.25


class SpilledRows:
    """[rows, width], written and read in stretches of neighbouring rows: what lies between is read along.

    The file is in the system's place for temporary files (TMPDIR). OSError where the disk is full.
    """

    device = torch.device("cpu")

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        self.width, self.dtype = width, dtype
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 – it lives as long as this does
        self._bytes = width * dtype.itemsize

    def __getitem__(self, rows: Int[Tensor, " *any"]) -> Float[Tensor, "*any width"]:
        first, last = int(rows.min()), int(rows.max())
        stretch = torch.empty(last - first + 1, self.width, dtype=self.dtype)
        if read_at(self._file.fileno(), tensor_bytes(stretch), first * self._bytes) < stretch.nbytes:
            raise ValueError(f"rows {first} to {last} were never written")
        return stretch[rows - first]

    def __setitem__(self, rows: Int[Tensor, " n"], values: Float[Tensor, "n width"]) -> None:
        """rows: rising without a gap."""
        left = tensor_bytes(values.to(self.dtype))
        offset = int(rows[0]) * self._bytes
        while len(left):
            put = os.pwrite(self._file.fileno(), left, offset)
            left, offset = left[put:], offset + put


def allocate_rows(subject: Subject, rows: int, width: int, dtype: torch.dtype) -> Tensor | SpilledRows:
    """Such rows, in memory if they are at most a quarter of what is free."""
    if rows * width * dtype.itemsize <= SHARE * free_memory(subject):
        return torch.empty(rows, width, dtype=dtype)
    return SpilledRows(width, dtype)
