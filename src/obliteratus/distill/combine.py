"""Steps that combine the previous directions with those of another step, or remove other directions from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, Field
from torch import Tensor
from torch.nn.functional import normalize

from obliteratus.core.progress import note
from obliteratus.core.registry import RunInputs
from obliteratus.core.settings import Step
from obliteratus.core.shapes import Float
from obliteratus.core.types import Activations, Directions
from obliteratus.distill.steps import (
    align_signs,
    check_prompt_count,
    compute_score,
    extractors,
    find_directions,
    mean_difference,
    orthonormalize,
    require_directions,
    require_group,
    require_rows,
)


def _check_step(step: Step) -> Step:
    extractors.check(step.use, step.options)
    return step


Other = Annotated[Step, AfterValidator(_check_step)]
"""Another distill step with its options, as an inline table: ``other = { use = "svd", k = 2 }``."""
SVD, BYPASS = Step(use="svd"), Step(use="bypass_contrast")


@extractors.register("bypass_contrast", needs=("bypass",))
def bypass_contrast(acts: Activations, previous: Directions | None) -> Directions:
    """Find the unit vector from the bypass mean to the target mean at each stream (k = 1).

    Bypass prompts ask for what target prompts ask for, worded so that the model answers. Their difference is therefore
    more about the behavior than about the topic. A run first checks that the model does answer them
    (`causal.check_bypass`). Like all directions, it points from the control group to the target group.
    raw: ‖μ_target − μ_bypass‖, in the stream's own units. Needs the group bypass; moments are enough.
    """
    require_group(acts, "bypass", "bypass_contrast")
    delta = mean_difference(acts, "target", "bypass")
    basis = align_signs(normalize(delta, dim=1)[:, None], mean_difference(acts))
    return Directions(basis, compute_score(acts, basis), delta.norm(dim=1), "‖μ_target − μ_bypass‖")


@extractors.register("union")
def union(acts: Activations, previous: Directions | None, *, other: Other = SVD) -> Directions:
    """Join the previous directions and those of another step into one subspace.

    other: a step that needs none before it; it gets the same activations. The previous rows stay first and unchanged; a
    row of the other step that they (nearly) span becomes zeros. raw stays that of the previous directions.
    """
    previous = require_directions(previous, "union")
    basis = orthonormalize(torch.cat([previous.basis, find_directions(acts, [other]).basis], 1))
    if not basis[:, previous.basis.shape[1] :].any():
        note("union", f"{other.use} adds no direction")
    return _with_basis(previous, acts, basis)


@extractors.register("blend")
def blend(
    acts: Activations,
    previous: Directions | None,
    *,
    other: Other = BYPASS,
    share: Annotated[float, Field(ge=0, le=1)] = 0.5,  # half way, because neither is known to be better
) -> Directions:
    """Turn row 0 towards row 0 of another step: normalize((1 − share)·own + share·other).

    The other row first gets the sign that agrees with our own, so that the two never cancel (the audited program
    compared |cos| only, and let them cancel). share: 0 keeps our own row, 1 takes the other; if one of the two is zero,
    the other one is used. The remaining rows follow, made orthogonal to the new row 0.
    """
    previous = require_directions(previous, "blend")
    row = _interpolate(previous.basis[:, 0], find_directions(acts, [other]).basis[:, 0], share)
    basis = orthonormalize(torch.cat([row[:, None], previous.basis[:, 1:]], 1))
    return _with_basis(previous, acts, basis)


@extractors.register("interpolate", cite="github.com/p-e-w/heretic")
def interpolate(
    acts: Activations,
    previous: Directions | None,
    *,
    at: Annotated[float, Field(ge=0, le=1)] = 0.65,  # the middle of 0.4–0.9, the range that Heretic searches
) -> Directions:
    """Use one direction at all layers, interpolated between two streams (k = 1): Heretic's fractional direction index.

    at: a place among the streams that leave the layers, 0–1: 0 is that of the first layer, 1 that of the last. It need
    not be one of them: at the fractional index i = 1 + at·(L − 1), row 0 of the two neighboring streams, with signs
    made to agree, is interpolated linearly and normalized. Heretic counts layers from 0, and its direction_index is
    at·(L − 1). `single` counts streams instead, and takes whole indices only.
    """
    previous = require_directions(previous, "interpolate")
    rows = previous.basis[:, 0]
    position = 1 + at * (len(rows) - 2)
    low = int(position)
    row = _interpolate(rows[low : low + 1], rows[low : low + 2][-1:], position - low)
    basis = row.expand(len(rows), -1)[:, None].contiguous()
    return Directions(basis, previous.score, previous.raw, previous.unit, previous.trace)


def _check_inputs(options: Mapping[str, Any], inputs: RunInputs) -> None:
    if options["k"]:
        check_prompt_count("keep_out", options["k"], inputs.counts["keep"], "keep", extra=1)  # the mean takes one


@extractors.register("keep_out", needs=("keep",), fits=_check_inputs)
def keep_out(
    acts: Activations,
    previous: Directions | None,
    *,
    k: Annotated[int, Field(ge=0, le=64)] = 0,
    share: Annotated[float, Field(ge=0, le=1)] = 1.0,
    control: bool = False,
) -> Directions:
    """Remove from each direction what distinguishes the group keep, so that the edit leaves those prompts alone.

    Removed are the mean difference of keep and control, and the k directions along which keep prompts vary most about
    their mean. share: of the component along them, how much is removed (λ of arXiv:2410.03415); 1 removes it all, 0.5
    half of it. control: remove the component along the control mean as well, all of it. Both are removed together: a
    step `orthogonal_to_control` after this one would bring some of the keep group's difference back. Rows stay
    orthonormal; a row that lay in the removed space becomes a row of zeros. Needs the group keep, and its rows if
    k > 0.
    """
    previous = require_directions(previous, "keep_out")
    require_group(acts, "keep", "keep_out")
    removed = normalize(mean_difference(acts, "keep"), dim=1)[:, None]
    if k > 0:
        removed = torch.cat([removed, _principal_directions(acts, k)], 1)
    means = normalize(acts["control"].mean, dim=1)[:, None] if control else removed[:, :0]
    kept_out = orthonormalize(torch.cat([means, removed], 1))
    factor = torch.ones(kept_out.shape[1])
    factor[means.shape[1] :] = share
    rest = previous.basis - torch.einsum("lkw,ljw,j,ljv->lkv", previous.basis, kept_out, factor, kept_out)
    return _with_basis(previous, acts, orthonormalize(rest))


def _principal_directions(acts: Activations, k: int) -> Float[Tensor, "streams k width"]:
    rows = require_rows(acts, "keep", "keep_out")
    check_prompt_count("keep_out", k, min(len(rows), rows.shape[2] + 1), "keep", extra=1)
    _, _, v = torch.linalg.svd((rows - acts["keep"].mean).transpose(0, 1), full_matrices=False)
    top: Tensor = v[:, :k]
    return top


def _interpolate(
    rows: Float[Tensor, "streams width"], others: Float[Tensor, "streams width"], share: float
) -> Float[Tensor, "streams width"]:
    """Return unit vectors between the one and the other, or the other's negative if that is nearer."""
    others = torch.where((rows * others).sum(1, keepdim=True) < 0, -others, others)
    return normalize(torch.lerp(rows, others, share), dim=1)


def _with_basis(previous: Directions, acts: Activations, basis: Float[Tensor, "streams k width"]) -> Directions:
    basis = align_signs(basis, mean_difference(acts))
    return Directions(basis, compute_score(acts, basis), previous.raw, previous.unit, previous.trace)
