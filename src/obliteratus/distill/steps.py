"""What every distill step shares: the registry, the common score, and the fold over a recipe's steps."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from obliteratus.core.errors import UserError
from obliteratus.core.registry import Registry, RunInputs
from obliteratus.core.settings import Step
from obliteratus.core.shapes import Float
from obliteratus.core.types import Activations, Directions, Moments

Extractor = Callable[..., Directions | Activations]
"""(activations, directions of the step before or None, **options) → directions, or activations for later steps."""


extractors: Registry[Extractor] = Registry("distill")

MODEL = "model"  # the need of steps that take a `tune.Lab`: (activations, directions so far, lab, **options)

# A mean difference this small beside the means is rounding: at stream 0 the last token of a template is the same
# for all prompts, and its difference is exactly this kind of nothing. fp32 means carry about 1e-7.
NOTHING = 1e-5


def find_directions(acts: Activations, steps: Sequence[Step], lab: object = None) -> Directions:
    """Fold the steps over the activations. Raises UserError where a step cannot run.

    lab: a `tune.Lab`, the model and the fit prompts, for steps that need the model ("model" among their needs).
    """
    found: Directions | None = None
    for step in steps:
        entry, options = extractors[step.use], extractors.check(step.use, step.options)
        if MODEL in entry.needs and lab is None:
            raise ValueError(f"distill step '{step.use}' asks the model: distill must be given a lab")
        made = entry.function(acts, found, *([lab] if MODEL in entry.needs else []), **options)
        if isinstance(made, Activations):
            acts = made
        else:
            found = made
    if found is None:
        raise UserError("recipe: distill has no step that finds directions; give at least one, e.g. mean_diff")
    return replace(found, trace=tuple(step.use for step in steps))


KEPT = {"rows": ("rows",), "spread": ("rows", "sketch")}
"""What a step may need of PROBE, and the values of ``probe.keep`` that give it."""


def check_needs(steps: Sequence[Step], groups: Collection[str], keep: str) -> None:
    """Refuse, before weights are loaded, steps that will lack prompts, their rows or their spread.

    groups: the groups of prompts that were given; keep: ``probe.keep``. Raises UserError, the same as the step would
    later.
    """
    for step in _flat(steps):
        for need in extractors[step.use].needs:
            if need in KEPT and keep not in KEPT[need]:
                raise missing_rows_error(step.use, need)
            if need not in (*KEPT, MODEL, *groups):
                raise _no_group(need, step.use)


def check_sizes(steps: Sequence[Step], given: RunInputs) -> None:
    """Refuse, before weights are loaded, steps whose options do not go with the prompts or the model's width."""
    for step in _flat(steps):
        extractors[step.use].fits(extractors.check(step.use, step.options), given)


def check_prompt_count(step: str, k: int, prompts: int, group: str = "target", spare: int = 0) -> None:
    """UserError unless there are at least k prompts for k directions, and ``spare`` more."""
    if prompts < k + spare:
        raise UserError(
            f"distill step '{step}': k={k} directions need at least {k + spare} {group} prompts; got {prompts}"
        )


def collect_needs(steps: Sequence[Step]) -> set[str]:
    """All that these steps, and steps inside them, cannot run without."""
    return {need for step in _flat(steps) for need in extractors[step.use].needs}


def _flat(steps: Sequence[Step]) -> Iterator[Step]:
    """The steps, and those that are options of others."""
    for step in steps:
        yield step
        options = extractors.check(step.use, step.options).values()
        yield from _flat([option for option in options if isinstance(option, Step)])


def previous_directions(so_far: Directions | None, step: str) -> Directions:
    """The directions that a step changes. Raises UserError where none were found yet, or oblique ones."""
    if so_far is None:
        raise UserError(f"distill step '{step}' changes the directions of a step before it; put e.g. mean_diff first")
    if so_far.covectors is not None:
        raise UserError(f"distill step '{step}' changes directions, and oblique ones (leace) cannot be; put leace last")
    return so_far


def mean_difference(acts: Activations, group: str = "target", other: str = "control") -> Float[Tensor, "streams width"]:
    """μ_group − μ_other, with streams in which it is rounding set to zero."""
    one, two = acts[group].mean, acts[other].mean
    delta, size = one - two, one.norm(dim=1) + two.norm(dim=1)
    return torch.where((delta.norm(dim=1) > NOTHING * size)[:, None], delta, torch.zeros_like(delta))


def relative_length(acts: Activations, length: Float[Tensor, " streams"]) -> Float[Tensor, " streams"]:
    """A length in units of ‖μ_target‖ + ‖μ_control‖. Of the mean difference, or any part of it: in 0–1."""
    size = acts["target"].mean.norm(dim=1) + acts["control"].mean.norm(dim=1)
    result: Tensor = length / size.clamp(min=torch.finfo(size.dtype).tiny)
    return result


def with_common_score(acts: Activations, basis: Float[Tensor, "streams k width"]) -> Float[Tensor, " streams"]:
    """The common score: the part of the mean difference that lies in the basis, as `relative_length`."""
    along = torch.einsum("lkw,lw->lk", basis, mean_difference(acts))
    return relative_length(acts, along.norm(dim=1)).clamp(0, 1)


def optional_group(acts: Activations, group: str, step: str) -> Moments:
    """What is known of an optional group. Raises UserError where it has no prompts."""
    if group not in acts.groups:
        raise _no_group(group, step)
    return acts[group]


def kept_rows(acts: Activations, group: str, step: str) -> Float[Tensor, "prompts streams width"]:
    """A group's kept rows. Raises UserError where the recipe kept only moments, or the group has no prompts."""
    rows = optional_group(acts, group, step).rows
    if rows is None:
        raise missing_rows_error(step)
    return rows


def missing_rows_error(step: str, need: str = "rows") -> UserError:
    """The error of a step whose need (of `KEPT`) PROBE did not keep."""
    what = {"rows": "every prompt's activations", "spread": "every prompt's activations or a sketch of them"}[need]
    ways = " or ".join(f'"{way}"' for way in KEPT[need])
    return UserError(f"distill step '{step}' needs {what}; set probe.keep = {ways}")


def _no_group(group: str, step: str) -> UserError:
    return UserError(f"distill step '{step}' needs the group '{group}', which has no prompts; give them with --{group}")


def align_signs(
    basis: Float[Tensor, "streams k width"], delta: Float[Tensor, "streams width"]
) -> Float[Tensor, "streams k width"]:
    """Each row turned so that its product with the mean difference is not negative: SVD leaves signs open."""
    sign = torch.einsum("lkw,lw->lk", basis, delta).sign()
    return basis * torch.where(sign == 0, torch.ones_like(sign), sign)[..., None]


# A row keeping less than this of its length after something was taken out of it is rounding, not a direction.
EMPTY_ROW = 1e-3


def orthonormalize(rows: Float[Tensor, "streams k width"]) -> Float[Tensor, "streams k width"]:
    """Gram–Schmidt, row order and signs kept; rows that are (nearly) zero or dependent become zeros.

    Not QR: that puts some other unit vector in a dependent row's place, and takes it out of all rows that follow.
    Lengths count: give rows of length one, or what is left of such rows.
    """
    done = torch.zeros_like(rows)
    for i in range(rows.shape[1]):
        row = rows[:, i]
        for _ in range(2):  # a second time takes out what rounding left of the first
            row = row - torch.einsum("lk,lkw->lw", torch.einsum("lkw,lw->lk", done, row), done)
        length = row.norm(dim=1, keepdim=True)
        done[:, i] = torch.where(length > EMPTY_ROW, row / length.clamp(min=EMPTY_ROW), torch.zeros_like(row))
    return done
