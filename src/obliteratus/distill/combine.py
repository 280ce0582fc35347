"""Steps that join the directions found so far with others, or take others out of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, Field
from torch import Tensor
from torch.nn.functional import normalize

from obliteratus.core.registry import RunInputs
from obliteratus.core.settings import Step
from obliteratus.core.shapes import Float
from obliteratus.core.types import Activations, Directions
from obliteratus.distill.steps import (
    align_signs,
    check_prompt_count,
    extractors,
    find_directions,
    kept_rows,
    mean_difference,
    optional_group,
    orthonormalize,
    previous_directions,
    with_common_score,
)


def _known(step: Step) -> Step:
    extractors.check(step.use, step.options)
    return step


Other = Annotated[Step, AfterValidator(_known)]
"""Another extractor with its options, as an inline table: ``other = { use = "svd", k = 2 }``."""
SVD, BYPASS = Step(use="svd"), Step(use="bypass_contrast")


@extractors.register("bypass_contrast", needs=("bypass",))
def bypass_contrast(acts: Activations, so_far: Directions | None) -> Directions:
    """The unit vector between the bypass group's mean and the target's, at each stream index (k = 1).

    Bypass prompts ask for what target prompts ask for, worded so that the model answers; their difference is then
    the behaviour more than the subject. A run asks the model first whether it does answer them (`tune.bypass`).
    Turned, like all directions, to the target's side of the control group.
    raw: ‖μ_target − μ_bypass‖, in the stream's own units. Needs the group bypass; moments are enough.
    """
    optional_group(acts, "bypass", "bypass_contrast")
    delta = mean_difference(acts, "target", "bypass")
    basis = align_signs(normalize(delta, dim=1)[:, None], mean_difference(acts))
    return Directions(basis, with_common_score(acts, basis), delta.norm(dim=1), "‖μ_target − μ_bypass‖")


@extractors.register("union")
def union(acts: Activations, so_far: Directions | None, *, other: Other = SVD) -> Directions:
    """The rows found so far and those of another extractor, as one subspace.

    other: a step that needs none before it; it sees the same activations. Rows found so far stay first and as
    they are; a row of the other that they (nearly) span becomes zeros. raw stays that of the rows found so far.
    """
    so_far = previous_directions(so_far, "union")
    basis = orthonormalize(torch.cat([so_far.basis, find_directions(acts, [other]).basis], 1))
    return _changed(so_far, acts, basis)


@extractors.register("blend")
def blend(
    acts: Activations,
    so_far: Directions | None,
    *,
    other: Other = BYPASS,
    share: Annotated[float, Field(ge=0, le=1)] = 0.5,  # half way: neither is known to be the better one
) -> Directions:
    """Row 0 turned towards row 0 of another extractor: normalise((1 − share)·own + share·other).

    The other is first given the sign that agrees with our own, so that the two never cancel (the audited program
    looked at |cos| only, and let them). share: 0 keeps our own, 1 takes the other; where one of the two found
    nothing, the rest of the blend stands. Further rows follow, made clear of the new row 0.
    """
    so_far = previous_directions(so_far, "blend")
    row = _between(so_far.basis[:, 0], find_directions(acts, [other]).basis[:, 0], share)
    basis = orthonormalize(torch.cat([row[:, None], so_far.basis[:, 1:]], 1))
    return _changed(so_far, acts, basis)


@extractors.register("interpolate", cite="github.com/p-e-w/heretic")
def interpolate(
    acts: Activations,
    so_far: Directions | None,
    *,
    at: Annotated[float, Field(ge=0, le=1)] = 0.65,  # the middle of 0.4–0.9, the range that Heretic searches
) -> Directions:
    """One direction for all layers, taken between two streams (k = 1): Heretic's fractional direction index.

    at: depth as a share of L, 0–1; at·L need not be whole: row 0 of the two streams beside it are blended in
    proportion, signs made to agree, and the blend is made a unit vector. `single` is the same without fractions.
    """
    so_far = previous_directions(so_far, "interpolate")
    rows = so_far.basis[:, 0]
    place = at * (len(rows) - 1)
    low = int(place)
    row = _between(rows[low : low + 1], rows[low : low + 2][-1:], place - low)
    basis = row.expand(len(rows), -1)[:, None].contiguous()
    return Directions(basis, so_far.score, so_far.raw, so_far.unit, so_far.trace)


def _fits(options: Mapping[str, Any], given: RunInputs) -> None:
    if options["k"]:
        check_prompt_count("keep_out", options["k"], given.counts["keep"], "keep", spare=1)  # one is lost to their mean


@extractors.register("keep_out", needs=("keep",), fits=_fits)
def keep_out(acts: Activations, so_far: Directions | None, *, k: Annotated[int, Field(ge=0, le=64)] = 0) -> Directions:
    """Takes out of each direction what the group keep lives on, so that removing it leaves those prompts alone.

    Out come the mean difference of keep and control, and the k directions in which keep prompts spread most about
    their mean. Rows stay orthonormal; a row that was all keep becomes a row of zeros. Needs the group keep; rows
    too where k > 0.
    """
    so_far = previous_directions(so_far, "keep_out")
    optional_group(acts, "keep", "keep_out")
    away = normalize(mean_difference(acts, "keep"), dim=1)[:, None]
    if k > 0:
        away = torch.cat([away, _spread(acts, k)], 1)
    away = orthonormalize(away)
    rest = so_far.basis - torch.einsum("lkw,ljw,ljv->lkv", so_far.basis, away, away)
    return _changed(so_far, acts, orthonormalize(rest))


def _spread(acts: Activations, k: int) -> Float[Tensor, "streams k width"]:
    rows = kept_rows(acts, "keep", "keep_out")
    check_prompt_count("keep_out", k, min(len(rows), rows.shape[2] + 1), "keep", spare=1)
    _, _, v = torch.linalg.svd((rows - acts["keep"].mean).transpose(0, 1), full_matrices=False)
    top: Tensor = v[:, :k]
    return top


def _between(
    one: Float[Tensor, "streams width"], two: Float[Tensor, "streams width"], share: float
) -> Float[Tensor, "streams width"]:
    """Unit vectors on the way from the one to the other, or to its negative where that is nearer."""
    two = torch.where((one * two).sum(1, keepdim=True) < 0, -two, two)
    return normalize(torch.lerp(one, two, share), dim=1)


def _changed(so_far: Directions, acts: Activations, basis: Float[Tensor, "streams k width"]) -> Directions:
    basis = align_signs(basis, mean_difference(acts))
    return Directions(basis, with_common_score(acts, basis), so_far.raw, so_far.unit, so_far.trace)
