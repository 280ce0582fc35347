"""Least-squares concept erasure (LEACE): the oblique projection after which no linear probe separates the groups.

That holds for activations that it is applied to. An edit of weights applies it to what the edited layers write, so the
stream keeps the difference that other layers write, or that edited ones write anew from what they read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from obliteratus.core.errors import UserError
from obliteratus.core.progress import note
from obliteratus.core.registry import RunInputs
from obliteratus.core.shapes import Float
from obliteratus.core.types import Activations, Directions
from obliteratus.distill.covariance import SHRINKAGE, SampleCovariance, Shrinkage, group_scatter
from obliteratus.distill.steps import (
    align_signs,
    compute_score,
    extractors,
    mean_difference,
    missing_rows_error,
    require_rows,
)

# Share of the largest singular value: means of categories that differ by less span no further direction, only rounding.
NEGLIGIBLE_SINGULAR_VALUE = 1e-4


def _check_inputs(options: Mapping[str, Any], inputs: RunInputs) -> None:
    if options["k"] > 1 and inputs.keep != "rows":
        raise missing_rows_error("leace")


@extractors.register("leace", cite="arXiv:2306.03819", needs=("spread",), fits=_check_inputs)
def leace(
    acts: Activations,
    previous: Directions | None,
    *,
    k: Annotated[int, Field(ge=1, le=64)] = 1,
    shrinkage: Shrinkage = SHRINKAGE,
) -> Directions:
    """Find the oblique projection P = I − BᵀA, A = (BΣ⁻¹Bᵀ)⁻¹BΣ⁻¹, that erases the difference with the least change.

    B (basis, orthonormal rows) spans what is erased, at each stream. k = 1: the groups' mean difference δ, so that A is
    δᵀΣ⁻¹·‖δ‖/(δᵀΣ⁻¹δ). k > 1: the first k right singular vectors of the mean differences between each target category
    and control, each weighted by the root of its number of prompts; if k categories each have a direction of their own,
    this is the published eraser of k + 1 classes. Prompts without a category count as one category.
    Σ is the covariance of both groups together, including their difference, as published, shrunk as in `covariance`
    (0 < s ≤ 1). At s = 1, A is B and P is the orthogonal projection.
    Applied to these activations at strength 1, P makes the groups' means equal; with fewer directions than categories
    the categories' means stay apart, and a note says by how much. The model's own stream is free of the difference only
    if everything that writes into it is edited along one and the same direction. To keep the mean along the directions
    as well, as the published eraser does, set ``excise.anchored``. raw: tr BΣ⁻¹Bᵀ with rows scaled to their
    singular values; for k = 1 δᵀΣ⁻¹δ, at most 4 / (1 − s) for groups of equal size. Steps that change directions do not
    accept oblique ones. Needs rows or a sketch; k > 1 needs rows, and raises UserError for fewer than k target
    categories.
    """
    delta, differences = mean_difference(acts), _category_differences(acts, k)
    basis, raw = delta.new_zeros(len(delta), k, delta.shape[1]), delta.new_zeros(len(delta))
    covectors = torch.zeros_like(basis)
    for stream in delta.norm(dim=1).nonzero().flatten().tolist():  # streams with no mean difference keep zeros
        sizes, rows = _singular_vectors(differences[:, stream], k)
        target, control = (group_scatter(acts, group, stream, "leace") for group in ("target", "control"))
        between = (target.prompts * control.prompts / (target.prompts + control.prompts)) ** 0.5
        covariance = SampleCovariance((target + control).with_row(between * delta[stream]), shrinkage)
        whitened = torch.stack([covariance.solve(row) for row in rows])
        gram = whitened.double() @ rows.T
        basis[stream, : len(rows)] = rows.float()
        covectors[stream, : len(rows)] = torch.linalg.solve(gram, whitened.double()).float()
        raw[stream] = gram.diagonal() @ sizes.square()
    aligned = align_signs(basis, delta)
    covectors = covectors * (aligned * basis).sum(2, keepdim=True)
    _note_remaining_gap(acts, aligned, covectors, k)
    return Directions(aligned, compute_score(acts, aligned), raw, "δᵀΣ⁻¹δ", covectors=covectors)


def _category_differences(acts: Activations, k: int) -> Float[Tensor, "categories streams width"]:
    """Return the target group's mean difference from control, or each category's, times √(its share of prompts)."""
    if k == 1:
        return mean_difference(acts)[None]
    rows, categories = require_rows(acts, "target", "leace"), set(acts["target"].categories)
    if len(categories) < k:
        raise UserError(
            f"distill step 'leace': k={k} directions need as many categories of target prompts; got {len(categories)}; "
            "give prompts a category, or a smaller k"
        )
    return _weighted_differences(acts, rows)


def _weighted_differences(
    acts: Activations, rows: Float[Tensor, "prompts streams width"]
) -> Float[Tensor, "categories streams width"]:
    """Return each target category's mean difference from control, times √(its share of the prompts)."""
    names = acts["target"].categories
    categories = list(dict.fromkeys(names))
    means = torch.stack([rows[[n == name for n in names]].double().mean(0) for name in categories]).float()
    share = torch.tensor([names.count(name) / len(names) for name in categories]).sqrt()
    return (means - acts["control"].mean) * share[:, None, None]


def measure_remaining_gap(
    differences: Float[Tensor, "categories streams width"],
    basis: Float[Tensor, "streams k width"],
    covectors: Float[Tensor, "streams k width"],
) -> Float[Tensor, " streams"]:
    """Return the share (0–1) of the weighted squared distances of the categories' means from the control mean that the
    projection leaves; 0 where there is no distance."""
    rest = differences - torch.einsum("clw,lkw,lkv->clv", differences, covectors, basis)
    left, whole = (x.double().square().sum((0, 2)) for x in (rest, differences))
    share: Tensor = left / whole.clamp(min=torch.finfo(whole.dtype).tiny)
    return share.float()


def _note_remaining_gap(acts: Activations, basis: Tensor, covectors: Tensor, k: int) -> None:
    """Say how much fewer directions than target categories leave, where every prompt's activations were kept."""
    rows, categories = acts["target"].rows, set(acts["target"].categories)
    if rows is None or len(categories) <= k:
        return
    stream = int(compute_score(acts, basis).argmax())
    left = float(measure_remaining_gap(_weighted_differences(acts, rows), basis, covectors)[stream])
    note(
        "leace",
        f"k={k} for {len(categories)} target categories leaves {left:.0%} of the squared distances of their means from "
        f"the control mean (stream {stream}, where the score is highest)",
    )


def _singular_vectors(
    differences: Float[Tensor, "categories width"], k: int
) -> tuple[Float[Tensor, " rank"], Float[Tensor, "rank width"]]:
    """Return at most k singular values and right singular vectors; fewer if the differences span no more."""
    _, sizes, rows = torch.linalg.svd(differences.double(), full_matrices=False)
    rank = (sizes[:k] > NEGLIGIBLE_SINGULAR_VALUE * sizes[0]).sum()
    return sizes[:rank], rows[:rank]
