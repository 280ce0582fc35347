"""Generalized eigenvectors of target against control prompts, and the oblique projection that removes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from obliteratus.core.registry import RunInputs
from obliteratus.core.shapes import Float
from obliteratus.core.types import Activations, Directions
from obliteratus.distill.covariance import SHRINKAGE, SampleCovariance, Shrinkage, group_scatter
from obliteratus.distill.steps import (
    align_signs,
    check_prompt_count,
    compute_score,
    extractors,
    mean_difference,
    orthonormalize,
)


def _check_inputs(options: Mapping[str, Any], inputs: RunInputs) -> None:
    check_prompt_count("generalized_eigen", options["k"], inputs.counts["target"])


@extractors.register("generalized_eigen", cite="doi:10.1109/T-C.1970.222918", needs=("spread",), fits=_check_inputs)
def generalized_eigen(
    acts: Activations,
    previous: Directions | None,
    *,
    k: Annotated[int, Field(ge=1, le=64)] = 1,
    shrinkage: Shrinkage = SHRINKAGE,
) -> Directions:
    """Find the oblique projection that removes what target prompts have most of, in units of control prompts' spread.

    M v = λ Σ v, with M the mean square of target prompts about the control mean and Σ the control covariance, shrunk as
    in `covariance` (0 < s ≤ 1). The k eigenvectors v with the largest λ span the covectors A, the vectors Σ v span the
    basis B, and P = I − BᵀA, A = (BΣ⁻¹Bᵀ)⁻¹BΣ⁻¹, changes control prompts least of all projections that remove them.
    Where target prompts differ from control by a shift alone, this is `leace` with the covariance of control prompts;
    where they differ in several ways, k finds them without categories. raw: Σλ over the k, without unit. Steps that
    change directions do not accept oblique ones. Needs rows or a sketch, and k ≤ target prompts.
    """
    delta, prompts = mean_difference(acts), acts["target"].count
    check_prompt_count("generalized_eigen", k, min(prompts, delta.shape[1]))
    basis, raw = delta.new_zeros(len(delta), k, delta.shape[1]), delta.new_zeros(len(delta))
    covectors = torch.zeros_like(basis)
    for stream in delta.norm(dim=1).nonzero().flatten().tolist():  # streams with no mean difference keep zeros
        target, control = (group_scatter(acts, group, stream, "generalized_eigen") for group in ("target", "control"))
        differences = target.with_row(prompts**0.5 * delta[stream]).rows
        covariance = SampleCovariance(control, shrinkage)
        values, rows = _find_eigenvectors(differences, covariance, k)
        basis[stream, : len(rows)], raw[stream] = rows, values.sum() / prompts
        covectors[stream, : len(rows)] = oblique_covectors(covariance, rows)
    aligned = align_signs(basis, delta)
    covectors = covectors * (aligned * basis).sum(2, keepdim=True)
    return Directions(aligned, compute_score(acts, aligned), raw, "λ of M v = λΣv", covectors=covectors)


def _find_eigenvectors(
    differences: Float[Tensor, "prompts width"], covariance: SampleCovariance, k: int
) -> tuple[Float[Tensor, " rank"], Float[Tensor, "rank width"]]:
    """Return prompts × λ, and orthonormal rows that span Σ v, for the k largest λ; fewer if the rows span fewer.

    With X the differences and XΣ^−½ = U S Wᵀ, v is Σ^−½w and Σv is Xᵀu / s, so no root of Σ is needed.
    """
    u, s, _ = torch.linalg.svd(covariance.whiten(differences).double(), full_matrices=False)
    rows = orthonormalize(normalize(u.T[:k] @ differences.double(), dim=1)[None])[0]
    spanned = rows.norm(dim=1) > 0
    return s[:k].square().float(), rows[spanned].float()


def eigenvalues(acts: Activations, stream: int, k: int, shrinkage: float) -> Float[Tensor, " k"]:
    """Return the k largest λ at one stream, in descending order. They are 1 where target prompts vary as control does.

    Raises UserError if PROBE kept neither rows nor a sketch.
    """
    target, control = (group_scatter(acts, group, stream, "generalized_eigen") for group in ("target", "control"))
    row = acts["target"].count ** 0.5 * mean_difference(acts)[stream]
    values, _ = _find_eigenvectors(target.with_row(row).rows, SampleCovariance(control, shrinkage), k)
    return values / acts["target"].count


def oblique_covectors(covariance: SampleCovariance, rows: Float[Tensor, "k width"]) -> Float[Tensor, "k width"]:
    """Return A = (BΣ⁻¹Bᵀ)⁻¹BΣ⁻¹ for orthonormal rows B."""
    whitened = torch.stack([covariance.solve(row) for row in rows]).double()
    covectors: Tensor = torch.linalg.solve(whitened @ rows.double().T, whitened).float()
    return covectors
