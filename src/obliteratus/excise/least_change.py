"""Covectors that remove the groups' difference from what a writer writes, and change all else that it writes least."""

from __future__ import annotations

import torch
from torch import Tensor

from obliteratus.core.probing import WriterContrast
from obliteratus.core.shapes import Float

# Differences of categories that are smaller than this share of the largest, in units of the spread of the outputs, are
# left to the others: reading them alone would take large covectors.
NEGLIGIBLE_SHARE = 1e-3


def choose_covectors(
    basis: Float[Tensor, "k out"], covectors: Float[Tensor, "k out"] | None, contrast: WriterContrast
) -> Float[Tensor, "k out"]:
    """Return the covectors A that read as much of the groups' differences D as those given, and else as little.

    Of all A with A Dᵀ = A₀Dᵀ they minimize the trace of A M Aᵀ, the mean square of what they read in the writer's
    outputs at all positions of control prompts: A = A₀Dᵀ (D M⁻¹ Dᵀ)⁺ D M⁻¹. A₀ is the basis if there are no covectors.
    For a single direction D is the mean difference; for several it has a row for each category of target prompts.
    Rank-one model editing (arXiv:2202.05262) takes the same minimum over a layer's inputs.
    """
    start = (basis if covectors is None else covectors).double()
    difference, whitened = contrast.difference.double(), contrast.whitened.double()
    if len(basis) == 1:
        share = contrast.share.double()
        difference, whitened = (share @ difference)[None], (share @ whitened)[None]
    gram = difference @ whitened.T
    inverse = torch.linalg.pinv((gram + gram.T) / 2, rtol=NEGLIGIBLE_SHARE, hermitian=True)
    chosen: Tensor = start @ difference.T @ inverse @ whitened
    return chosen.to(basis)


def remove_difference(contrast: WriterContrast, k: int) -> tuple[Float[Tensor, "k out"], Float[Tensor, "k out"]]:
    """Return the rows B and covectors A that remove a writer's own difference between the groups, and least else.

    B spans the k largest principal axes of the categories' differences D, each weighted by its share of the prompts;
    for k = 1 it is the mean difference. A = (B M⁻¹ Bᵀ)⁻¹ B M⁻¹ reads least of all projections along B: A Bᵀ = I. There
    are fewer rows where the categories differ in fewer ways, and none where the groups do not differ.
    """
    difference, whitened = contrast.difference.double(), contrast.whitened.double()
    share = contrast.share.double()
    if k == 1:
        mixed = share[None]
    else:
        left, size, _ = torch.linalg.svd(share.sqrt()[:, None] * difference, full_matrices=False)
        mixed = (left[:, : min(k, int((size > NEGLIGIBLE_SHARE * size.max()).sum()))] * share.sqrt()[:, None]).T
    rows, read = mixed @ difference, mixed @ whitened
    lengths = rows.norm(dim=1, keepdim=True)
    present = lengths[:, 0] > 0
    basis, read = rows[present] / lengths[present], read[present] / lengths[present]
    covectors: Tensor = torch.linalg.solve(read @ basis.T, read)
    return basis.to(contrast.difference), covectors.to(contrast.difference)
