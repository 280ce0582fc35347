"""Least-squares concept erasure: the oblique projection after which no linear probe tells the groups apart."""

from __future__ import annotations

import torch
from torch.nn.functional import normalize

from obliteratus.distill.steps import difference, extractors, rows_of, scored
from obliteratus.distill.whiten import SHRINKAGE, Shrinkage, Spread
from obliteratus.types import Activations, Directions


@extractors.register("leace", cite="arXiv:2306.03819", needs=("rows",))
def leace(acts: Activations, so_far: Directions | None, *, shrinkage: Shrinkage = SHRINKAGE) -> Directions:
    """The eraser P = I − δ(δᵀΣ⁻¹)/(δᵀΣ⁻¹δ) of least change in the groups' own spread, at each stream index (k = 1).

    basis: δ/‖δ‖, δ the mean difference; covectors: Σ⁻¹δ·‖δ‖/(δᵀΣ⁻¹δ). Σ is the covariance of both groups together,
    their difference included, as published; shrunk in the span of the prompts (`whiten`), 0 < s ≤ 1. At s = 1 the
    two are one vector, and P is the orthogonal projection.
    Cut at strength 1, the groups' means are equal and nothing along δ is measured any more; that the constant part
    stays as it was, too, needs ``excise.anchored`` (the published eraser keeps the mean).
    raw: δᵀΣ⁻¹δ, at most 4 / (1 − s) for groups of one size, since Σ holds their difference. Steps that change
    directions do not take oblique ones. Needs rows.
    """
    delta = difference(acts)
    basis, raw = normalize(delta, dim=1)[:, None], delta.new_zeros(len(delta))
    covectors = torch.zeros_like(basis)
    for stream in delta.norm(dim=1).nonzero().flatten().tolist():  # elsewhere nothing was found
        rows = torch.cat([rows_of(acts, group, "leace")[:, stream] for group in ("target", "control")])
        found = Spread(rows - rows.mean(0), shrinkage).inverse(delta[stream])
        raw[stream] = found @ delta[stream]
        covectors[stream, 0] = found * (delta[stream].norm() / raw[stream])
    return Directions(basis, scored(acts, basis), raw, "δᵀΣ⁻¹δ", covectors=covectors)
