"""Subspaces by singular value decomposition of the differences between target and control prompts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

import torch
from pydantic import Field

from obliteratus.core.errors import UserError
from obliteratus.core.registry import RunInputs
from obliteratus.core.types import Activations, Directions, Moments
from obliteratus.distill.covariance import Scatter, group_scatter
from obliteratus.distill.steps import (
    align_signs,
    check_prompt_count,
    compute_score,
    extractors,
    mean_difference,
    missing_rows_error,
    orthonormalize,
    require_rows,
)


def _check_inputs(options: Mapping[str, Any], inputs: RunInputs) -> None:
    check_prompt_count("svd", options["k"], inputs.counts["target"])
    if options["paired"]:
        if inputs.keep != "rows":
            raise missing_rows_error("svd")
        _check_equal_counts(inputs.counts["target"], inputs.counts["control"])


@extractors.register("svd", cite="arXiv:2512.18901", needs=("spread",), fits=_check_inputs)
def svd(
    acts: Activations,
    previous: Directions | None,
    *,
    k: Annotated[int, Field(ge=1, le=64)] = 4,
    paired: bool = False,
    centered: bool = False,
) -> Directions:
    """Find the top k right singular vectors of the prompts' differences at each stream.

    paired: subtract control prompt i from target prompt i (the groups must be matched one to one); otherwise subtract
    the control mean from every target prompt. Each row is flipped to point from control to target.
    centered: subtract the mean of the differences first, so that the singular vectors describe spread alone and do not
    mix with the shift. Row 0 is then the mean difference, and the k − 1 directions of most spread follow, orthogonal to
    it.
    raw: Σσ² over the k rows divided by the number of prompts, in squared stream units (if centered, ‖Δμ‖² replaces
    σ₀²/n). Needs rows or a sketch (paired: rows), and k ≤ prompts.
    """
    delta, prompts = mean_difference(acts), acts["target"].count
    check_prompt_count("svd", k, min(prompts, delta.shape[1]))
    scatters = [_difference_scatter(acts, stream, paired) for stream in range(len(delta))]
    if not centered:
        scatters = [x.with_row(prompts**0.5 * d) for x, d in zip(scatters, delta, strict=True)]
    decompositions = [torch.linalg.svd(x.rows, full_matrices=False)[1:] for x in scatters]
    sigma, v = (torch.stack(parts) for parts in zip(*((s[:k], v[:k]) for s, v in decompositions), strict=True))
    unit = torch.nn.functional.normalize(delta, dim=1)[:, None]
    basis = align_signs(orthonormalize(torch.cat([unit, v[:, : k - 1]], 1)) if centered else v, delta)
    basis = basis * (delta.norm(dim=1) > 0)[:, None, None]  # zeros at streams with no mean difference
    spread = sigma[:, : k - 1 if centered else k].square().sum(1) / prompts
    raw = spread + delta.square().sum(1) if centered else spread
    return Directions(basis.contiguous(), compute_score(acts, basis), raw, "Σσ²/n")


@extractors.register("pairs", cite="arXiv:2512.18901", needs=("rows",))
def pair_prompts(acts: Activations, previous: Directions | None) -> Activations:
    """Cut the larger of the groups target and control to the size of the smaller one, for ``svd`` with ``paired``.

    The first prompts are kept. Prompt i of one group is then paired with prompt i of the other, in the order given;
    nothing else relates them. Needs rows.
    """
    rows = {group: require_rows(acts, group, "pairs") for group in ("target", "control")}
    n = min(len(x) for x in rows.values())
    paired = {g: Moments(n, x[:n].double().mean(0).float(), x[:n], acts[g].categories[:n]) for g, x in rows.items()}
    return replace(acts, groups={**acts.groups, **paired})


def _difference_scatter(acts: Activations, stream: int, paired: bool) -> Scatter:
    """Return the scatter of the differences about their own mean."""
    if not paired:
        return group_scatter(acts, "target", stream, "svd")
    target, control = (require_rows(acts, group, "svd")[:, stream] for group in ("target", "control"))
    _check_equal_counts(len(target), len(control))
    rows = target - control
    return Scatter(rows - rows.mean(0), float(rows.var(0, correction=0).sum()) * len(rows), len(rows))


def _check_equal_counts(target: int, control: int) -> None:
    if target != control:
        raise UserError(
            f"distill step 'svd': paired=true needs groups of equal size; got {target} target and "
            f"{control} control prompts; give matched files, set paired=false, or put the step 'pairs' first"
        )
