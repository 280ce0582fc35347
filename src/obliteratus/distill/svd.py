"""Subspaces by singular value decomposition."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

import torch
from pydantic import Field

from obliteratus.core.errors import UserError
from obliteratus.core.registry import RunInputs
from obliteratus.core.types import Activations, Directions, Moments
from obliteratus.distill.scatter import Scatter, group_scatter
from obliteratus.distill.steps import (
    align_signs,
    check_prompt_count,
    extractors,
    kept_rows,
    mean_difference,
    missing_rows_error,
    orthonormalize,
    with_common_score,
)


def _fits(options: Mapping[str, Any], given: RunInputs) -> None:
    check_prompt_count("svd", options["k"], given.counts["target"])
    if options["paired"]:
        if given.keep != "rows":
            raise missing_rows_error("svd")
        _matched(given.counts["target"], given.counts["control"])


@extractors.register("svd", cite="arXiv:2512.18901", needs=("spread",), fits=_fits)
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
    centred). Needs rows or a sketch, paired: rows; k ≤ prompts.
    """
    delta, prompts = mean_difference(acts), acts["target"].count
    check_prompt_count("svd", k, min(prompts, delta.shape[1]))
    spread = [_differences(acts, stream, paired) for stream in range(len(delta))]
    rows = spread if centred else [x.beside(prompts**0.5 * d) for x, d in zip(spread, delta, strict=True)]
    found = [torch.linalg.svd(x.rows, full_matrices=False)[1:] for x in rows]
    sigma, v = (torch.stack(parts) for parts in zip(*((s[:k], v[:k]) for s, v in found), strict=True))
    unit = torch.nn.functional.normalize(delta, dim=1)[:, None]
    basis = align_signs(orthonormalize(torch.cat([unit, v[:, : k - 1]], 1)) if centred else v, delta)
    basis = basis * (delta.norm(dim=1) > 0)[:, None, None]  # no mean difference: nothing was found here
    own = sigma[:, : k - 1 if centred else k].square().sum(1) / prompts
    raw = own + delta.square().sum(1) if centred else own
    return Directions(basis.contiguous(), with_common_score(acts, basis), raw, "Σσ²/n")


@extractors.register("pairs", cite="arXiv:2512.18901", needs=("rows",))
def pair_prompts(acts: Activations, so_far: Directions | None) -> Activations:
    """As many target as control prompts, for ``svd`` with ``paired``: of the larger group, the first ones.

    Prompt i of the one group then stands beside prompt i of the other, as they come: nothing else makes them a pair.
    Needs rows.
    """
    rows = {group: kept_rows(acts, group, "pairs") for group in ("target", "control")}
    n = min(len(x) for x in rows.values())
    cut = {g: Moments(n, x[:n].double().mean(0).float(), x[:n], acts[g].categories[:n]) for g, x in rows.items()}
    return replace(acts, groups={**acts.groups, **cut})


def _differences(acts: Activations, stream: int, paired: bool) -> Scatter:
    """About their mean."""
    if not paired:
        return group_scatter(acts, "target", stream, "svd")
    target, control = (kept_rows(acts, group, "svd")[:, stream] for group in ("target", "control"))
    _matched(len(target), len(control))
    rows = target - control
    return Scatter(rows - rows.mean(0), float(rows.var(0, correction=0).sum()) * len(rows), len(rows))


def _matched(target: int, control: int) -> None:
    if target != control:
        raise UserError(
            f"distill step 'svd': paired=true needs groups of one length, got {target} target and "
            f"{control} control prompts; give matched files or set paired=false"
        )
