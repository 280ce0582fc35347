"""Subspaces by singular value decomposition."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from obliteratus.distill.steps import aligned, difference, enough, extractors, orthonormal, rows_of, scored
from obliteratus.errors import UserError
from obliteratus.registry import Given
from obliteratus.shapes import Float
from obliteratus.types import Activations, Directions, Moments


def _fits(options: Mapping[str, Any], given: Given) -> None:
    enough("svd", options["k"], given.counts["target"])
    if options["paired"]:
        _matched(given.counts["target"], given.counts["control"])


@extractors.register("svd", cite="arXiv:2512.18901", needs=("rows",), fits=_fits)
def svd(
    acts: Activations,
    so_far: Directions | None,
    *,
    k: Annotated[int, Field(ge=1, le=64)] = 4,
    paired: bool = False,
    centred: bool = False,
) -> Directions:
    """Top k right singular vectors of the differences, at each stream index.

    paired: subtract control prompt i from target prompt i (the groups must be matched one to one); otherwise
    subtract the control mean from every target prompt. Each row is turned to point from control to target.
    centred: subtract the mean of the differences first, so that the singular vectors are spread alone and do not
    mix with the shift; row 0 is then the mean difference, and the k − 1 rows of most spread follow, clear of it.
    raw: Σσ² over the k rows and the prompts' number, in squared stream units (‖Δμ‖² stands for σ₀²/n where
    centred). Needs rows; k ≤ prompts.
    """
    rows = _differences(acts, paired)
    enough("svd", k, min(rows.shape[0], rows.shape[2]))
    mean = rows.mean(0) if centred else torch.zeros_like(rows[0])
    _, sigma, v = torch.linalg.svd((rows - mean).transpose(0, 1), full_matrices=False)
    delta = difference(acts)
    unit = torch.nn.functional.normalize(delta, dim=1)[:, None]
    basis = orthonormal(torch.cat([unit, v[:, : k - 1]], 1)) if centred else v[:, :k]
    basis = aligned(basis, delta)
    basis = basis * (delta.norm(dim=1) > 0)[:, None, None]  # no mean difference: nothing was found here
    raw = sigma[:, : k - 1 if centred else k].square().sum(1) / rows.shape[0] + mean.square().sum(1)
    return Directions(basis.contiguous(), scored(acts, basis), raw, "Σσ²/n")


@extractors.register("pairs", cite="arXiv:2512.18901", needs=("rows",))
def pairs(acts: Activations, so_far: Directions | None) -> Activations:
    """As many target as control prompts, for ``svd`` with ``paired``: of the larger group, the first ones.

    Prompt i of the one group then stands beside prompt i of the other, as they come: nothing else makes them a pair.
    Needs rows.
    """
    rows = {group: rows_of(acts, group, "pairs") for group in ("target", "control")}
    n = min(len(x) for x in rows.values())
    cut = {g: Moments(n, x[:n].double().mean(0).float(), x[:n], acts[g].categories[:n]) for g, x in rows.items()}
    return replace(acts, groups={**acts.groups, **cut})


def _differences(acts: Activations, paired: bool) -> Float[Tensor, "prompts streams width"]:
    target = rows_of(acts, "target", "svd")
    if not paired:
        return target - acts["control"].mean
    control = rows_of(acts, "control", "svd")
    _matched(len(target), len(control))
    return target - control


def _matched(target: int, control: int) -> None:
    if target != control:
        raise UserError(
            f"distill step 'svd': paired=true needs groups of one length, got {target} target and "
            f"{control} control prompts; give matched files or set paired=false"
        )
