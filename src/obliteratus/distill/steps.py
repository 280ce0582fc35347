"""What all distill steps share: their registry, the loop over a recipe's steps, checks, and saving directions."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from obliteratus.core.errors import UserError
from obliteratus.core.orthonormal import orthonormalize as orthonormalize
from obliteratus.core.registry import Registry, RunInputs
from obliteratus.core.settings import Step, active_steps
from obliteratus.core.shapes import Float
from obliteratus.core.types import Activations, Directions, Moments

Extractor = Callable[..., Directions | Activations]
"""(activations, directions of the previous step or None, **options) → directions, or activations for later steps."""

extractors: Registry[Extractor] = Registry("distill", renamed={"winsorise": "winsorize", "svd.centred": "centered"})

# The need of steps that run the model: (activations, previous directions, FitContext, **options).
MODEL = "model"

# A mean difference this small relative to the means is rounding (fp32 means carry about 1e-7): at stream 0 the last
# token of a template is the same for all prompts, so the difference there is rounding alone.
NEGLIGIBLE_DIFFERENCE = 1e-5


# ------------------------------------------------------------------------------------------- running steps
def find_directions(
    acts: Activations, steps: Sequence[Step | str] = ("mean_diff",), context: object = None
) -> Directions:
    """Run the steps in order, but those left out, and return the last one's directions. Raises UserError if one cannot.

    steps: with their options, or by name alone. context: the `FitContext` (model and fit prompts), for steps that run
    the model ("model" among their needs).

    >>> ob.find_directions(acts, ["mean_diff", ob.Step(use="single", depth=0.5)])
    <Directions: 1 in each of 9 streams of width 32, by mean_diff → single; clearest at stream 4, score 0.965>
    """
    directions, active = None, active_steps(steps)
    for step in active:
        entry, options = extractors[step.use], extractors.check(step.use, step.options)
        if MODEL in entry.needs and context is None:
            raise UserError(
                f"distill step '{step.use}' runs the model; give find_directions a FitContext(subject, prompts)"
            )
        result = entry.function(acts, directions, *([context] if MODEL in entry.needs else []), **options)
        if isinstance(result, Activations):
            acts = result
        else:
            directions = result
    if directions is None:
        raise UserError("recipe: distill has no step that finds directions; give at least one, e.g. mean_diff")
    return replace(directions, trace=tuple(map(name_step, active)))


def name_step(step: Step) -> str:
    """Return a step's name, followed by those of the steps in its options, such as ``union sae``."""
    options = extractors.check(step.use, step.options).values()
    return " ".join([step.use, *(name_step(option) for option in options if isinstance(option, Step))])


KEEP_MODES = {"rows": ("rows",), "spread": ("rows", "sketch")}
"""What a step may need of PROBE, and the values of ``probe.keep`` that provide it."""


def check_needs(steps: Sequence[Step], groups: Collection[str], keep: str) -> None:
    """Check, before weights are loaded, that all steps will have the prompts and activations that they need.

    groups: the groups of prompts that were given; keep: ``probe.keep``. Raises the UserError that the step itself would
    raise later.
    """
    for step in _flatten(steps):
        for need in extractors[step.use].needs:
            if need in KEEP_MODES and keep not in KEEP_MODES[need]:
                raise missing_rows_error(step.use, need)
            if need not in (*KEEP_MODES, MODEL, *groups):
                raise _missing_group_error(need, step.use)


def check_sizes(steps: Sequence[Step], inputs: RunInputs) -> None:
    """Check, before weights are loaded, that step options fit the number of prompts and the model's width."""
    for step in _flatten(steps):
        extractors[step.use].fits(extractors.check(step.use, step.options), inputs)


def collect_needs(steps: Sequence[Step]) -> set[str]:
    """Return all needs of these steps and of the steps nested in their options."""
    return {need for step in _flatten(steps) for need in extractors[step.use].needs}


def _flatten(steps: Sequence[Step]) -> Iterator[Step]:
    """Yield the steps that are not left out, and those nested in their options."""
    for step in active_steps(steps):
        yield step
        options = extractors.check(step.use, step.options).values()
        yield from _flatten([option for option in options if isinstance(option, Step)])


# --------------------------------------------------------------------------------------------- requirements
def check_prompt_count(step: str, k: int, prompts: int, group: str = "target", extra: int = 0) -> None:
    """Raise UserError unless there are at least ``k + extra`` prompts for k directions."""
    if prompts < k + extra:
        raise UserError(
            f"distill step '{step}': k={k} directions need at least {k + extra} {group} prompts; got {prompts}"
        )


def require_directions(previous: Directions | None, step: str) -> Directions:
    """Return the directions that a step is to change. Raises UserError if there are none, or if they are oblique."""
    if previous is None:
        raise UserError(f"distill step '{step}' changes the directions of a step before it; put e.g. mean_diff first")
    if previous.covectors is not None:
        raise UserError(f"distill step '{step}' cannot change oblique directions (leace); put leace last")
    return previous


def require_group(acts: Activations, group: str, step: str) -> Moments:
    """Return an optional group's moments. Raises UserError if the group has no prompts."""
    if group not in acts.groups:
        raise _missing_group_error(group, step)
    return acts[group]


def require_rows(acts: Activations, group: str, step: str) -> Float[Tensor, "prompts streams width"]:
    """Return a group's activations, one row per prompt. Raises UserError if PROBE did not keep them."""
    rows = require_group(acts, group, step).rows
    if rows is None:
        raise missing_rows_error(step)
    return rows


def missing_rows_error(step: str, need: str = "rows") -> UserError:
    """Return the error for a step whose need (a key of `KEEP_MODES`) PROBE did not keep."""
    what = {"rows": "every prompt's activations", "spread": "every prompt's activations or a sketch of them"}[need]
    values = " or ".join(f'"{value}"' for value in KEEP_MODES[need])
    return UserError(f"distill step '{step}' needs {what}; set probe.keep = {values}")


def _missing_group_error(group: str, step: str) -> UserError:
    return UserError(f"distill step '{step}' needs the group '{group}', which has no prompts; give them with --{group}")


# ---------------------------------------------------------------------------------------------- mathematics
def mean_difference(acts: Activations, group: str = "target", other: str = "control") -> Float[Tensor, "streams width"]:
    """Return μ_group − μ_other, with zeros at streams where it is rounding alone."""
    mean, other_mean = acts[group].mean, acts[other].mean
    delta, size = mean - other_mean, mean.norm(dim=1) + other_mean.norm(dim=1)
    return torch.where((delta.norm(dim=1) > NEGLIGIBLE_DIFFERENCE * size)[:, None], delta, torch.zeros_like(delta))


def relative_length(acts: Activations, length: Float[Tensor, " streams"]) -> Float[Tensor, " streams"]:
    """Return a length divided by ‖μ_target‖ + ‖μ_control‖: in 0–1 for the mean difference or any part of it."""
    size = acts["target"].mean.norm(dim=1) + acts["control"].mean.norm(dim=1)
    result: Tensor = length / size.clamp(min=torch.finfo(size.dtype).tiny)
    return result


def compute_score(acts: Activations, basis: Float[Tensor, "streams k width"]) -> Float[Tensor, " streams"]:
    """Return the score that all steps share: the `relative_length` of the mean difference's part inside the basis."""
    along = torch.einsum("lkw,lw->lk", basis, mean_difference(acts))
    return relative_length(acts, along.norm(dim=1)).clamp(0, 1)


def align_signs(
    basis: Float[Tensor, "streams k width"], delta: Float[Tensor, "streams width"]
) -> Float[Tensor, "streams k width"]:
    """Flip rows so that their product with the mean difference is not negative; an SVD leaves signs undetermined."""
    sign = torch.einsum("lkw,lw->lk", basis, delta).sign()
    return basis * torch.where(sign == 0, torch.ones_like(sign), sign)[..., None]


# --------------------------------------------------------------------------------------------------- on disk
def save_directions(directions: Directions, folder: Path) -> None:
    """Write directions.safetensors and directions.json into an existing folder, so that a resumed run reuses them."""
    tensors = {"basis": directions.basis, "score": directions.score, "raw": directions.raw}
    if directions.covectors is not None:
        tensors["covectors"] = directions.covectors
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, folder / "directions.safetensors")
    (folder / "directions.json").write_text(
        json.dumps({"unit": directions.unit, "trace": directions.trace, "origin": directions.origin}), encoding="utf-8"
    )


def load_directions(folder: Path) -> Directions:
    """Read what `save_directions` wrote."""
    data = json.loads((folder / "directions.json").read_text(encoding="utf-8"))
    origin = None if data["origin"] is None else (int(data["origin"][0]), float(data["origin"][1]))
    tensors = load_file(folder / "directions.safetensors")
    return Directions(**tensors, unit=data["unit"], trace=tuple(data["trace"]), origin=origin)
