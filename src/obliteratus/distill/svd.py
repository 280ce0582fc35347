"""Subspaces by singular value decomposition."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from obliteratus.distill.steps import difference, extractors, rows_of, scored
from obliteratus.errors import UserError
from obliteratus.shapes import Float
from obliteratus.types import Activations, Directions


@extractors.register("svd", cite="arXiv:2512.18901")
def svd(
    acts: Activations,
    so_far: Directions | None,
    *,
    k: Annotated[int, Field(ge=1, le=64)] = 4,
    paired: bool = False,
) -> Directions:
    """Top k right singular vectors of the differences, at each stream index.

    paired: subtract control prompt i from target prompt i (the groups must be matched one to one); otherwise
    subtract the control mean from every target prompt. Each row is turned to point from control to target.
    raw: Σσ² over the k rows and the prompts' number, in squared stream units. Needs rows; k ≤ prompts.
    """
    rows = _differences(acts, paired)
    if min(rows.shape[0], rows.shape[2]) < k:
        raise UserError(f"distill step 'svd': k={k} directions need at least {k} prompts; got {rows.shape[0]}")
    _, sigma, v = torch.linalg.svd(rows.transpose(0, 1), full_matrices=False)
    delta = difference(acts)
    basis = aligned(v[:, :k], delta)
    basis = basis * (delta.norm(dim=1) > 0)[:, None, None]  # no mean difference: nothing was found here
    raw = sigma[:, :k].square().sum(1) / rows.shape[0]
    return Directions(basis.contiguous(), scored(acts, basis), raw, "Σσ²/n")


def _differences(acts: Activations, paired: bool) -> Float[Tensor, "prompts streams width"]:
    target = rows_of(acts, "target", "svd")
    if not paired:
        return target - acts["control"].mean
    control = rows_of(acts, "control", "svd")
    if len(target) != len(control):
        raise UserError(
            f"distill step 'svd': paired=true needs groups of one length, got {len(target)} target and "
            f"{len(control)} control prompts; give matched files or set paired=false"
        )
    return target - control


def aligned(
    basis: Float[Tensor, "streams k width"], delta: Float[Tensor, "streams width"]
) -> Float[Tensor, "streams k width"]:
    """Each row turned so that its product with the mean difference is not negative: SVD leaves signs open."""
    sign = torch.einsum("lkw,lw->lk", basis, delta).sign()
    return basis * torch.where(sign == 0, torch.ones_like(sign), sign)[..., None]
