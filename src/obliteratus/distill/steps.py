"""What every distill step shares: the registry, the common score, and the fold over a recipe's steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from obliteratus.errors import UserError
from obliteratus.registry import Registry
from obliteratus.shapes import Float
from obliteratus.types import Activations, Directions, Step

Extractor = Callable[..., Directions | Activations]
"""(activations, directions of the step before or None, **options) → directions, or activations for later steps."""


extractors: Registry[Extractor] = Registry("distill")

# A mean difference this small beside the means is rounding: at stream 0 the last token of a template is the same
# for all prompts, and its difference is exactly this kind of nothing. fp32 means carry about 1e-7.
NOTHING = 1e-5


def distill(acts: Activations, steps: Sequence[Step]) -> Directions:
    """Fold the steps over the activations. Raises UserError where a step cannot run."""
    found: Directions | None = None
    for step in steps:
        made = extractors[step.use].function(acts, found, **extractors.check(step.use, step.options))
        if isinstance(made, Activations):
            acts = made
        else:
            found = made
    if found is None:
        raise UserError("recipe: distill has no step that finds directions; give at least one, e.g. mean_diff")
    return replace(found, trace=tuple(step.use for step in steps))


def before(so_far: Directions | None, step: str) -> Directions:
    """The directions that a step changes. Raises UserError where none were found yet."""
    if so_far is None:
        raise UserError(f"distill step '{step}' changes the directions of a step before it; put e.g. mean_diff first")
    return so_far


def difference(acts: Activations) -> Float[Tensor, "streams width"]:
    """μ_target − μ_control, with streams in which it is rounding set to zero."""
    delta = acts["target"].mean - acts["control"].mean
    return torch.where((share(acts, delta.norm(dim=1)) > NOTHING)[:, None], delta, torch.zeros_like(delta))


def share(acts: Activations, length: Float[Tensor, " streams"]) -> Float[Tensor, " streams"]:
    """A length in units of ‖μ_target‖ + ‖μ_control‖. Of the mean difference, or any part of it: in 0–1."""
    size = acts["target"].mean.norm(dim=1) + acts["control"].mean.norm(dim=1)
    result: Tensor = length / size.clamp(min=torch.finfo(size.dtype).tiny)
    return result


def scored(acts: Activations, basis: Float[Tensor, "streams k width"]) -> Float[Tensor, " streams"]:
    """The common score: the part of the mean difference that lies in the basis, as `share`."""
    along = torch.einsum("lkw,lw->lk", basis, difference(acts))
    return share(acts, along.norm(dim=1)).clamp(0, 1)


def rows_of(acts: Activations, group: str, step: str) -> Float[Tensor, "prompts streams width"]:
    """A group's kept rows. Raises UserError where the recipe kept only moments."""
    rows = acts[group].rows
    if rows is None:
        raise UserError(f"distill step '{step}' needs every prompt's activations; set probe.keep = \"rows\"")
    return rows


# A row keeping less than this of its length after something was taken out of it is rounding, not a direction.
EMPTY_ROW = 1e-3


def orthonormal(rows: Float[Tensor, "streams k width"]) -> Float[Tensor, "streams k width"]:
    """Gram–Schmidt by QR, row order and signs kept; rows that are (nearly) zero or dependent become zeros."""
    q, r = torch.linalg.qr(rows.mT)
    size = r.diagonal(dim1=-2, dim2=-1)
    sign = torch.where(size < 0, -1.0, 1.0) * (size.abs() > EMPTY_ROW)
    rows = q * sign[:, None]
    return rows.mT.contiguous()
