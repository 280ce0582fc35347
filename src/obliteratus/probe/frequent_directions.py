"""Frequent Directions: the scatter of a group of prompts in a few rows for each stream, however many prompts there are.

Rows fill a buffer of 2ℓ rows. Once it is full, its squared singular values shrink by the (ℓ + 1)-th of them, δ, which
leaves ℓ rows. For the rows B in the buffer and all rows A that were added, 0 ≤ AᵀA − BᵀB ≤ Σδ along every direction,
and Σδ ≤ ‖A − A_k‖² / (ℓ + 1 − k) for each k ≤ ℓ. Sources: Liberty 2013, arXiv:1206.0594; Ghashami and others 2016,
arXiv:1501.01711.
"""

from __future__ import annotations

import torch
from torch import Tensor

from obliteratus.core.shapes import Float
from obliteratus.core.types import Sketch

# Squared lengths below this share of the longest are rounding errors of fp64 products of fp32 rows.
ROUNDING = 1e-14


class FrequentDirections:
    """A running sketch of rows about their mean, although the mean is known only after the last row."""

    def __init__(self, streams: int, width: int, size: int) -> None:
        """size: ℓ, the most rows of the sketch for each stream."""
        self.size, self.filled, self.count = size, 0, 0
        self.buffer = torch.zeros(streams, 2 * size, width)
        self.mean = torch.zeros(streams, width, dtype=torch.float64)
        self.lost, self.total = (torch.zeros(streams, dtype=torch.float64) for _ in range(2))

    def add(self, rows: Float[Tensor, "rows streams width"]) -> None:
        """Add rows. The scatter about the common mean is that of each batch about its own mean, plus one row for the
        difference between the means."""
        n, rows = len(rows), rows.double()
        mean = rows.mean(0)
        between = (mean - self.mean) * (self.count * n / (self.count + n)) ** 0.5
        self.mean += (mean - self.mean) * (n / (self.count + n))
        self.count += n
        for part in torch.cat([rows - mean, between[None]]).split(self.size):
            self._append(part.transpose(0, 1))

    def _append(self, rows: Float[Tensor, "streams rows width"]) -> None:
        self.total += rows.square().sum((1, 2))
        if self.filled + rows.shape[1] > 2 * self.size:
            self._shrink()
        self.buffer[:, self.filled : self.filled + rows.shape[1]] = rows
        self.filled += rows.shape[1]

    def _shrink(self) -> None:
        rows = self.buffer[:, : self.filled].double()
        values, vectors = torch.linalg.eigh(rows @ rows.mT)  # ascending
        top, delta = values[:, -self.size :], values[:, -self.size - 1, None].clamp(min=0)
        ratio = ((top - delta).clamp(min=0) / top.clamp(min=ROUNDING * top[:, -1:])).nan_to_num(0).sqrt()
        self.buffer[:, : self.size] = (ratio[..., None] * (vectors[..., -self.size :].mT @ rows)).float()
        self.lost += delta[:, 0]
        self.filled = self.size

    def sketch(self) -> Sketch:
        """Return the sketch of all rows so far, at most ``size`` rows for each stream."""
        if self.filled > self.size:
            self._shrink()
        return Sketch(self.buffer[:, : self.filled].clone(), self.lost.float(), self.total.float())
