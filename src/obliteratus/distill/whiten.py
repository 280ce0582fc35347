"""Directions in units of the groups' own spread, computed in the span of the prompts: no width × width matrix.

With S the sample covariance and s the shrinkage, Σ = (1 − s)·S + s·m·I, as Ledoit and Wolf (2004) shrink, but m is
the *typical* variance of a dimension: the median of S's non-zero eigenvalues times their number over the width.
Their m is the mean. A few massive dimensions make up that mean, and the floor that it lays buries all others: of 64
with three of std 300, |cos| of whitened_svd to a planted direction falls from 0.92 to 0.02 at s = 0.1. A diagonal
target does well only where massive directions lie along single dimensions (0.04 where they lie askew).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from obliteratus.core.registry import RunInputs
from obliteratus.core.shapes import Float
from obliteratus.core.types import Activations, Directions
from obliteratus.distill.scatter import Scatter, group_scatter
from obliteratus.distill.steps import align_signs, check_prompt_count, extractors, mean_difference, with_common_score

Rows = Float[Tensor, "prompts width"]
Shrinkage = Annotated[float, Field(gt=0, le=1)]
"""0 is left out: with fewer prompts than width, Σ would have no inverse."""
# Measured at 200 prompts × width 64, 64 × 256 and 48 × 384 beside three dimensions of std 300, the others' std
# spread by a factor of 1.35: |cos| to the truth of whitened_svd and discriminant at 0.1, 0.5 and 0.8 is
# 0.91/0.86, 0.94/0.91 and 0.95/0.94. Towards 1 it becomes plain svd, and massive dimensions come back.
SHRINKAGE = 0.5
# Control prompts that are all the same have no variance at all; real ones are far above.
TINY = 1e-12


def _fits(options: Mapping[str, Any], given: RunInputs) -> None:
    check_prompt_count("whitened_svd", options["k"], given.counts["target"])


@extractors.register("whitened_svd", cite="arXiv:1512.00809", needs=("spread",), fits=_fits)
def whitened_svd(
    acts: Activations,
    so_far: Directions | None,
    *,
    k: Annotated[int, Field(ge=1, le=64)] = 4,
    shrinkage: Shrinkage = SHRINKAGE,
) -> Directions:
    """Top k right singular vectors of the target prompts' differences from the control mean, control spread made round.

    Whitened by the symmetric Σ^−½ (ZCA: of all whitenings the one that moves vectors least), so that a direction of
    the whitened space is used as it is, and rows are orthonormal. Mapping back with Σ^½ would undo the whitening:
    it gives the raw difference, massive dimensions first. Σ⁻¹ of the difference is `discriminant`; removing that
    leaves more of the difference itself. shrinkage: s above, in (0, 1]; 1 is plain `svd`. raw: Σσ² over the k rows
    and the prompts' number, in units of Σ. Needs rows or a sketch; k ≤ prompts.
    """
    delta, prompts = mean_difference(acts), acts["target"].count
    check_prompt_count("whitened_svd", k, min(prompts, delta.shape[1]))
    basis, raw = delta.new_zeros(len(delta), k, delta.shape[1]), delta.new_zeros(len(delta))
    for stream in delta.norm(dim=1).nonzero().flatten().tolist():  # elsewhere nothing was found
        target, control = (group_scatter(acts, group, stream, "whitened_svd") for group in ("target", "control"))
        rows = SampleCovariance(control, shrinkage).half(target.beside(prompts**0.5 * delta[stream]).rows)
        _, sigma, v = torch.linalg.svd(rows, full_matrices=False)
        basis[stream], raw[stream] = v[:k], sigma[:k].square().sum() / prompts
    basis = align_signs(basis, delta)
    return Directions(basis, with_common_score(acts, basis), raw, "Σσ²/n, whitened")


@extractors.register("discriminant", cite="doi:10.1111/j.1469-1809.1936.tb02137.x", needs=("spread",))
def discriminant(
    acts: Activations,
    so_far: Directions | None,
    *,
    within: Literal["both", "control"] = "both",
    shrinkage: Shrinkage = SHRINKAGE,
) -> Directions:
    """Fisher's linear discriminant: the unit vector along Σ⁻¹(μ_target − μ_control), at each stream index (k = 1).

    within: whose covariance Σ is, "both" groups about their own means (Fisher's) or "control" alone (what the
    audited program names Wasserstein-optimal). shrinkage: s above, in (0, 1]. It tells the groups apart best, and
    leans away from dimensions that vary much by themselves. raw: δᵀΣ⁻¹δ, the squared Mahalanobis distance; with
    fewer prompts than width it flatters. Needs rows or a sketch.
    """
    delta = mean_difference(acts)
    groups = ("target", "control") if within == "both" else ("control",)
    basis, raw = torch.zeros_like(delta)[:, None], delta.new_zeros(len(delta))
    for stream in delta.norm(dim=1).nonzero().flatten().tolist():
        first, *more = (group_scatter(acts, group, stream, "discriminant") for group in groups)
        found = SampleCovariance(sum(more, first), shrinkage, len(groups)).inverse(delta[stream])
        basis[stream, 0], raw[stream] = torch.nn.functional.normalize(found, dim=0), found @ delta[stream]
    return Directions(basis, with_common_score(acts, basis), raw, "δᵀΣ⁻¹δ")


def median_eigenvalue(values: Float[Tensor, " rows"], rank: int, total: float) -> float:
    """Median of ``rank`` eigenvalues that make up ``total``, of which the largest are known (ascending).

    Those that a sketch leaves out are taken for equal: they are what its rows fall short of the total by.
    """
    known = values[-rank:]
    missing = rank - len(known)
    rest = known.new_full((missing,), max(total - known.sum().item(), 0.0) / max(missing, 1))
    return torch.cat([rest, known]).median().item()


class SampleCovariance:
    """Σ as above, known by its prompts: products with its inverse and root cost O(prompts × width) a row."""

    def __init__(self, scatter: Scatter, s: float, means: int = 1) -> None:
        """means: how many means were taken out of the prompts."""
        free = max(scatter.prompts - means, 1)
        rows = scatter.rows.double() / free**0.5
        # With more prompts than width, the triangular factor has the same RᵀR in fewer rows.
        self.rows: Tensor = torch.linalg.qr(rows, mode="r")[1] if len(rows) > rows.shape[1] else rows
        values, self.vectors = torch.linalg.eigh(self.rows @ self.rows.T)
        rank, width = min(free, rows.shape[1]), rows.shape[1]
        self.floor = s * max(median_eigenvalue(values, rank, scatter.total / free) * rank / width, TINY)
        self.values = (1 - s) * values.clamp(min=0) + self.floor
        self.own = 1 - s

    def half(self, rows: Rows) -> Rows:
        """rows · Σ^−½: in these coordinates the covariance is the identity."""
        # λ^−½ − f^−½, written so that it neither cancels nor divides by small eigenvalues
        root, floor = self.values.sqrt(), self.floor**0.5
        return self._along(rows, floor, -self.own / (root * floor * (root + floor)))

    def inverse(self, vector: Float[Tensor, " width"]) -> Float[Tensor, " width"]:
        """Σ⁻¹ · vector, by Woodbury's identity."""
        return self._along(vector[None], self.floor, -self.own / (self.values * self.floor))[0]

    def _along(self, rows: Rows, floor: float, more: Tensor) -> Rows:
        """rows · (I / floor + Xᵀ U diag(more) Uᵀ X), with X the prompts and U diag(·) Uᵀ = XXᵀ."""
        rows = rows.double()
        inside = rows @ self.rows.T @ self.vectors * more
        made: Tensor = rows / floor + inside @ self.vectors.T @ self.rows
        return made.float()
