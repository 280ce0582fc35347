"""Directions in units of the groups' own spread: whitened SVD and Fisher's discriminant (see `covariance` for Σ)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from obliteratus.core.registry import RunInputs
from obliteratus.core.types import Activations, Directions
from obliteratus.distill.covariance import SHRINKAGE, SampleCovariance, Shrinkage, group_scatter
from obliteratus.distill.steps import align_signs, check_prompt_count, compute_score, extractors, mean_difference


def _check_inputs(options: Mapping[str, Any], inputs: RunInputs) -> None:
    check_prompt_count("whitened_svd", options["k"], inputs.counts["target"])


@extractors.register("whitened_svd", cite="arXiv:1512.00809", needs=("spread",), fits=_check_inputs)
def whitened_svd(
    acts: Activations,
    previous: Directions | None,
    *,
    k: Annotated[int, Field(ge=1, le=64)] = 4,
    shrinkage: Shrinkage = SHRINKAGE,
) -> Directions:
    """Find the top k right singular vectors of target − control mean, after whitening by the control covariance.

    The whitening is the symmetric Σ^−½ (ZCA, which of all whitenings moves vectors least), so a direction of the
    whitened space is used as it is and rows are orthonormal. Mapping back with Σ^½ would undo the whitening and return
    the raw difference, massive dimensions first. Σ⁻¹ of the difference is `discriminant`; removing that leaves more of
    the difference itself. shrinkage: s of Σ, in (0, 1]; 1 is plain `svd`. raw: Σσ² over the k rows divided by the
    number of prompts, in units of Σ. Needs rows or a sketch, and k ≤ prompts.
    """
    delta, prompts = mean_difference(acts), acts["target"].count
    check_prompt_count("whitened_svd", k, min(prompts, delta.shape[1]))
    basis, raw = delta.new_zeros(len(delta), k, delta.shape[1]), delta.new_zeros(len(delta))
    for stream in delta.norm(dim=1).nonzero().flatten().tolist():  # streams with no mean difference keep zeros
        target, control = (group_scatter(acts, group, stream, "whitened_svd") for group in ("target", "control"))
        differences = target.with_row(prompts**0.5 * delta[stream]).rows
        whitened = SampleCovariance(control, shrinkage).whiten(differences)
        _, sigma, v = torch.linalg.svd(whitened, full_matrices=False)
        basis[stream], raw[stream] = v[:k], sigma[:k].square().sum() / prompts
    basis = align_signs(basis, delta)
    return Directions(basis, compute_score(acts, basis), raw, "Σσ²/n, whitened")


@extractors.register("discriminant", cite="doi:10.1111/j.1469-1809.1936.tb02137.x", needs=("spread",))
def discriminant(
    acts: Activations,
    previous: Directions | None,
    *,
    within: Literal["both", "control"] = "both",
    shrinkage: Shrinkage = SHRINKAGE,
) -> Directions:
    """Find Fisher's linear discriminant, the unit vector along Σ⁻¹(μ_target − μ_control), at each stream (k = 1).

    within: the groups whose covariance Σ is: "both" about their own means (Fisher's), or "control" alone (what the
    audited program calls Wasserstein-optimal). shrinkage: s of Σ, in (0, 1]. The discriminant separates the groups
    best, and leans away from dimensions that vary much anyway. raw: δᵀΣ⁻¹δ, the squared Mahalanobis distance, which is
    too large with fewer prompts than width. Needs rows or a sketch.
    """
    delta = mean_difference(acts)
    groups = ("target", "control") if within == "both" else ("control",)
    basis, raw = torch.zeros_like(delta)[:, None], delta.new_zeros(len(delta))
    for stream in delta.norm(dim=1).nonzero().flatten().tolist():
        first, *others = (group_scatter(acts, group, stream, "discriminant") for group in groups)
        direction = SampleCovariance(sum(others, first), shrinkage, len(groups)).solve(delta[stream])
        basis[stream, 0], raw[stream] = torch.nn.functional.normalize(direction, dim=0), direction @ delta[stream]
    return Directions(basis, compute_score(acts, basis), raw, "δᵀΣ⁻¹δ")
