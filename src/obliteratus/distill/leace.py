"""Least-squares concept erasure: the oblique projection after which no linear probe tells the groups apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from obliteratus.core.errors import UserError
from obliteratus.core.registry import RunInputs
from obliteratus.core.shapes import Float
from obliteratus.core.types import Activations, Directions
from obliteratus.distill.scatter import group_scatter
from obliteratus.distill.steps import (
    align_signs,
    extractors,
    kept_rows,
    mean_difference,
    missing_rows_error,
    with_common_score,
)
from obliteratus.distill.whiten import SHRINKAGE, SampleCovariance, Shrinkage

# Of the largest singular value: categories' means that differ by less span no further direction, only rounding.
NONE = 1e-4


def _fits(options: Mapping[str, Any], given: RunInputs) -> None:
    if options["k"] > 1 and given.keep != "rows":
        raise missing_rows_error("leace")


@extractors.register("leace", cite="arXiv:2306.03819", needs=("spread",), fits=_fits)
def leace(
    acts: Activations,
    so_far: Directions | None,
    *,
    k: Annotated[int, Field(ge=1, le=64)] = 1,
    shrinkage: Shrinkage = SHRINKAGE,
) -> Directions:
    """The eraser of least change in the prompts' own spread: P = I − BᵀA with A = (BΣ⁻¹Bᵀ)⁻¹BΣ⁻¹, at each stream index.

    B (basis, orthonormal rows) spans what is erased. k = 1: the groups' mean difference δ, so that A is
    δᵀΣ⁻¹·‖δ‖/(δᵀΣ⁻¹δ). k > 1: the first k right singular vectors of the target categories' mean differences from
    control, each weighted by the root of its prompts' number; with k categories of their own directions this is the
    published eraser of k + 1 classes. Prompts of a category that has no name are one of their own.
    Σ is the covariance of both groups together, their difference included, as published; shrunk in the span of the
    prompts (`whiten`), 0 < s ≤ 1. At s = 1 A is B, and P is the orthogonal projection.
    Cut at strength 1, the groups' means are equal (of k > 1: as far as k directions go) and nothing along them is
    measured any more; that the constant part stays as it was, too, needs ``excise.anchored`` (the published eraser
    keeps the mean). raw: tr BΣ⁻¹Bᵀ with rows as long as what they stand for; for k = 1 δᵀΣ⁻¹δ, at most 4 / (1 − s)
    for groups of one size. Steps that change directions do not take oblique ones. Needs rows or a sketch; for k > 1
    rows, and k categories of target prompts, or UserError.
    """
    delta, apart = mean_difference(acts), _apart(acts, k)
    basis, raw = delta.new_zeros(len(delta), k, delta.shape[1]), delta.new_zeros(len(delta))
    covectors = torch.zeros_like(basis)
    for stream in delta.norm(dim=1).nonzero().flatten().tolist():  # elsewhere nothing was found
        length, found = _rows(apart[:, stream], k)
        target, control = (group_scatter(acts, group, stream, "leace") for group in ("target", "control"))
        between = (target.prompts * control.prompts / (target.prompts + control.prompts)) ** 0.5
        spread = SampleCovariance((target + control).beside(between * delta[stream]), shrinkage)
        whitened = torch.stack([spread.inverse(row) for row in found])
        gram = whitened.double() @ found.T
        basis[stream, : len(found)] = found.float()
        covectors[stream, : len(found)] = torch.linalg.solve(gram, whitened.double()).float()
        raw[stream] = gram.diagonal() @ length.square()
    signs = align_signs(basis, delta)
    covectors = covectors * (signs * basis).sum(2, keepdim=True)
    return Directions(signs, with_common_score(acts, signs), raw, "δᵀΣ⁻¹δ", covectors=covectors)


def _apart(acts: Activations, k: int) -> Float[Tensor, "categories streams width"]:
    """Mean differences from control: of the whole group, or of its categories, weighted by √(share of the prompts)."""
    if k == 1:
        return mean_difference(acts)[None]
    rows, names = kept_rows(acts, "target", "leace"), acts["target"].categories
    known = list(dict.fromkeys(names))
    if len(known) < k:
        raise UserError(
            f"distill step 'leace': k={k} directions need as many categories of target prompts; got {len(known)}; "
            "give prompts a category, or a smaller k"
        )
    means = torch.stack([rows[[n == name for n in names]].double().mean(0) for name in known]).float()
    share = torch.tensor([names.count(name) / len(names) for name in known]).sqrt()
    return (means - acts["control"].mean) * share[:, None, None]


def _rows(
    apart: Float[Tensor, "categories width"], k: int
) -> tuple[Float[Tensor, " found"], Float[Tensor, "found width"]]:
    """Singular values and right singular vectors: at most k, fewer where the differences span no more."""
    _, sizes, rows = torch.linalg.svd(apart.double(), full_matrices=False)
    kept = (sizes[:k] > NONE * sizes[0]).sum()
    return sizes[:kept], rows[:kept]
