"""How a group of prompts spreads, in a few rows for each stream however many prompts there are.

Frequent Directions (Liberty 2013, arXiv:1206.0594; Ghashami and others 2016, arXiv:1501.01711): rows fill a buffer of
2ℓ; once it is full, its squared singular values shrink by the (ℓ + 1)-th, δ, which leaves ℓ rows. For what is kept, B,
and all that came, A, 0 ≤ AᵀA − BᵀB ≤ Σδ along every direction, and Σδ ≤ ‖A − A_k‖² / (ℓ + 1 − k) for each k ≤ ℓ.
"""

from __future__ import annotations

import torch
from torch import Tensor

from obliteratus.core.shapes import Float
from obliteratus.core.types import Sketch

# A shrunk buffer's row below this share of the longest is rounding of the products, in fp64, of fp32 rows.
ROUNDING = 1e-14


class FrequentDirections:
    """A running sketch of rows about their mean, which is not known before the last of them."""

    def __init__(self, streams: int, width: int, size: int) -> None:
        """size: ℓ, the rows that are left for each stream."""
        self.size, self.filled, self.count = size, 0, 0
        self.buffer = torch.zeros(streams, 2 * size, width)
        self.mean = torch.zeros(streams, width, dtype=torch.float64)
        self.lost, self.total = (torch.zeros(streams, dtype=torch.float64) for _ in range(2))

    def add(self, rows: Float[Tensor, "rows streams width"]) -> None:
        """Scatter about the common mean is that of each batch about its own, and what lies between the means."""
        n, rows = len(rows), rows.double()
        mean = rows.mean(0)
        between = (mean - self.mean) * (self.count * n / (self.count + n)) ** 0.5
        self.mean += (mean - self.mean) * (n / (self.count + n))
        self.count += n
        for part in torch.cat([rows - mean, between[None]]).split(self.size):
            self._put(part.transpose(0, 1))

    def _put(self, rows: Float[Tensor, "streams rows width"]) -> None:
        self.total += rows.square().sum((1, 2))
        if self.filled + rows.shape[1] > 2 * self.size:
            self._shrink()
        self.buffer[:, self.filled : self.filled + rows.shape[1]] = rows
        self.filled += rows.shape[1]

    def _shrink(self) -> None:
        rows = self.buffer[:, : self.filled].double()
        values, vectors = torch.linalg.eigh(rows @ rows.mT)  # ascending
        kept, off = values[:, -self.size :], values[:, -self.size - 1, None].clamp(min=0)
        ratio = ((kept - off).clamp(min=0) / kept.clamp(min=ROUNDING * kept[:, -1:])).nan_to_num(0).sqrt()
        self.buffer[:, : self.size] = (ratio[..., None] * (vectors[..., -self.size :].mT @ rows)).float()
        self.lost += off[:, 0]
        self.filled = self.size

    def sketch(self) -> Sketch:
        """Of all rows so far, at most ``size`` for each stream."""
        if self.filled > self.size:
            self._shrink()
        return Sketch(self.buffer[:, : self.filled].clone(), self.lost.float(), self.total.float())
