"""Covectors that remove the groups' difference from what a writer writes, and change all else that it writes least."""

from __future__ import annotations

import torch
from torch import Tensor

from obliteratus.core.shapes import Float
from obliteratus.core.types import WriterContrast

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
