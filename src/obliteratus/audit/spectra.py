"""The spectrum of a difference: its largest singular values and vectors, and how many stand out of noise."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from obliteratus.core.shapes import Float

# Matrices up to this size are decomposed exactly, from their Gram matrix in fp64: 0.1 s at 576. Of larger ones the
# largest singular values are found by subspace iteration (Halko et al., arXiv:0909.4061), in a tenth of the time.
EXACT = 1024
KEPT = 72  # singular values and vectors of a large matrix: adapters of rank 64 and a few more
ITERATIONS = 4
NOISE_EDGE = 1.02
"""How far singular values of noise may exceed the sum of its largest row's and column's lengths.

Independent entries stay below the sum (Latala's bound). Measured on nine matrices of the organism astronomy: at most
0.93 of it for Gaussian noise, 0.83 for Q8_0, 0.82 for bf16; 1.37 for Q4_0, whose errors depend on the numbers."""
FLAT = 0.6
"""How much steeper than that of Gaussian noise a spectrum may fall and still be noise: the value three quarters down,
as a share of the largest, is 0.7 of the Gaussian's for rounding to bf16, whose errors differ in size."""
NOISY_RANK = 16
"""Most singular values that stand out of noise where there is noise. With more of them it is no noise: behind the
largest values of trained matrices (30 and more of them) the rest is about as flat as noise."""
NEGLIGIBLE = 1e-7  # share of the squared length behind an exact rank: 1e-12 for changes of low rank in fp32
MAX_RANK = 64  # the largest that adapters usually have; more than that counts as full


@dataclass(frozen=True)
class Spectrum:
    """Singular values of a matrix, largest first, with their vectors."""

    sizes: Float[Tensor, " n"]
    left: Float[Tensor, "out n"]
    right: Float[Tensor, "n inp"]
    energy: float
    """Squared Frobenius norm of the whole matrix."""
    exact: bool
    """Whether the values are exact; otherwise they are found at random and iterated."""

    @property
    def stable_rank(self) -> float:
        """‖D‖²_F ÷ ‖D‖²₂, between 1 and the rank."""
        return self.energy / max(float(self.sizes[0]) ** 2, 1e-300)


@dataclass(frozen=True)
class Rank:
    """How many singular values stand out of noise."""

    count: int
    share: float
    """Share (0–1) of the squared length that they hold."""
    ends: bool
    """Whether what is left behind them is like noise; otherwise the matrix has no low rank."""


def decompose(matrix: Float[Tensor, "out inp"], keep: int = KEPT) -> Spectrum:
    """Return the spectrum: all singular values if a side has at most `EXACT` numbers, else the largest ``keep``."""
    energy = float(matrix.double().square().sum())
    if min(matrix.shape) <= EXACT:
        return _decompose_exactly(matrix, energy, keep)
    columns = min(*matrix.shape, keep + 8)
    start = torch.randn(matrix.shape[1], columns, generator=torch.Generator().manual_seed(0)).to(matrix)
    span = torch.linalg.qr(matrix @ start)[0]
    for _ in range(ITERATIONS):
        span = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ span)[0])[0]
    u, sizes, right = torch.linalg.svd(span.T @ matrix, full_matrices=False)
    return Spectrum(sizes[:keep], (span @ u)[:, :keep], right[:keep], energy, False)


def is_flat(spectrum: Spectrum, count: int, shape: tuple[int, ...]) -> bool:
    """Return whether few singular values stand out, and those behind them fall no faster than those of noise."""
    rest = spectrum.sizes[count:]
    if count > NOISY_RANK:
        return False
    if len(rest) < 4 or float(rest[0]) <= 0:
        return True
    noise = _noise_sizes(*shape)[: len(rest)]
    index = 3 * min(len(rest), len(noise)) // 4
    return float(rest[index] / rest[0]) >= FLAT * float(noise[index] / noise[0])


@cache
def _noise_sizes(rows: int, columns: int) -> Tensor:
    """Return the singular values that Gaussian noise of a shape has, as far as `decompose` gives them."""
    return decompose(torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))).sizes


def _decompose_exactly(matrix: Tensor, energy: float, keep: int) -> Spectrum:
    wide = matrix.shape[0] <= matrix.shape[1]
    tall = (matrix.mT if wide else matrix).double()
    squared, vectors = torch.linalg.eigh(tall.mT @ tall)
    sizes, vectors = squared.clamp(min=0).sqrt().flip(0), vectors.flip(1)[:, :keep]
    other = tall @ vectors
    other = other / other.norm(dim=0).clamp(min=1e-300)
    left, right = (vectors, other.mT) if wide else (other, vectors.mT)
    return Spectrum(sizes, left, right, energy, True)


def top_factors(matrix: Float[Tensor, "out inp"], rank: int) -> tuple[Float[Tensor, "out r"], Float[Tensor, "r inp"]]:
    """Return U [out, r] with orthonormal columns and C = Uᵀ D, so that U C is the nearest matrix of this rank."""
    columns = min(*matrix.shape, rank + 7)
    start = torch.randn(matrix.shape[1], columns, generator=torch.Generator().manual_seed(0)).to(matrix)
    span = torch.linalg.qr(matrix @ start)[0]
    for _ in range(ITERATIONS):
        span = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ span)[0])[0]
    u = span @ torch.linalg.svd(span.T @ matrix, full_matrices=False)[0][:, :rank]
    return u, u.T @ matrix


def count_rank(matrix: Float[Tensor, "out inp"], spectrum: Spectrum, floor: float = 0.0) -> Rank:
    """Return how many singular values stand out of what noise would have, at most `MAX_RANK`.

    floor: squared length that rounding is known to have; a rest of that size ends the search.
    """
    count, known = 0, len(spectrum.left[0])
    limit = min(MAX_RANK, known - 1)
    tails = spectrum.energy - spectrum.sizes[:limit].double().square().cumsum(0)
    if ended := (tails <= max(floor, NEGLIGIBLE * spectrum.energy)).nonzero()[:, 0].tolist():
        return Rank(ended[0] + 1, 1 - max(float(tails[ended[0]]), 0.0) / max(spectrum.energy, 1e-300), True)
    while True:
        rest = matrix - spectrum.left[:, :count] @ (spectrum.sizes[:count, None] * spectrum.right[:count])
        squared = rest.double().square()
        left_over = float(squared.sum())
        edge = NOISE_EDGE * (float(squared.sum(0).max()) ** 0.5 + float(squared.sum(1).max()) ** 0.5)
        above = int((spectrum.sizes[: limit + 1] > edge).sum())
        share = 1 - left_over / max(spectrum.energy, 1e-300)
        if above <= count or left_over <= floor:
            return Rank(count, share, True)
        if count >= limit:
            return Rank(count, share, False)
        count = min(max(above, count + 1), limit)
