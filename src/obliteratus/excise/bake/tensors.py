"""A plan baked into weights: one matrix in memory at a time, computed in fp32 and cast once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from obliteratus.core.errors import UserError
from obliteratus.core.types import Change, Plan, Shift, Site, Subject
from obliteratus.excise.bake.quantized import RequantizationLosses, requantize_module
from obliteratus.excise.change import edit_module_bias, edit_module_weight, fill_donor_means, needs_bias, select_changes
from obliteratus.excise.plan import check_fits
from obliteratus.summon.sites import find_architecture
from obliteratus.weights.bitsandbytes import is_packed
from obliteratus.weights.matrices import convert_to_stored, count_outputs, expand_experts, has_bias, read_bias

Lazy = Callable[[], Tensor]


def bake(subject: Subject, plan: Plan, losses: RequantizationLosses | None = None) -> dict[str, Lazy]:
    """Return the edited parameters by name, each as a function that computes it, so that none need be held.

    If an anchored edit needs a bias that the architecture can switch on, the new biases are included (zeros where
    nothing is anchored); set the configuration by `find_bias_switches`. A packed matrix is dequantized once for all its
    changes and its bias, and requantized once; what that loses is added to ``losses``. Raises UserError if a needed
    bias cannot be switched on.
    """
    check_fits(subject, plan)
    result: dict[str, Lazy] = _zero_biases(subject, find_bias_switches(subject, plan))
    for name, changes in plan.by_site().items():
        site = changes[0].site
        module = subject.module(site.path)
        if is_packed(module):
            result |= requantize_module(site.path, module, changes, subject.model.dtype, losses)
            continue
        result[name] = edit_parameter(module, changes)
        bias = edit_biases(module, changes)
        if bias is not None:
            result[f"{site.path}.{site.bias}"] = _cast_like_weight(bias, module, site)
    return result


def find_bias_switches(subject: Subject, plan: Plan) -> dict[str, str]:
    """Return the configuration key to set for each half of the blocks, ``attn`` or ``mlp``, that gets new biases.

    Raises UserError if a change needs a bias that the architecture cannot have.
    """
    switches: dict[str, str] = {}
    family = find_architecture(subject.model.config)
    for edit in filter(needs_bias, plan.edits):
        biased = has_bias(subject.module(edit.site.path), edit.site)
        half = edit.site.part.partition(".")[0]
        if biased and edit.site.stacked and not family.routing_sums_to_one:
            raise UserError(missing_bias_error(edit, "one that routing does not scale"))
        if not biased and half not in family.bias_switch:
            raise UserError(missing_bias_error(edit))
        if not biased:
            switches[half] = family.bias_switch[half]
    return switches


def _zero_biases(subject: Subject, halves: Mapping[str, str]) -> dict[str, Lazy]:
    """Return zero biases for every site of these halves, since the switch gives each of them one."""
    sites = [s for s in subject.sites if s.part.partition(".")[0] in halves]
    widths = {f"{s.path}.{s.bias}": count_outputs(subject.module(s.path), s) for s in sites}
    return {name: partial(torch.zeros, width, dtype=subject.model.dtype) for name, width in widths.items()}


def missing_bias_error(change: Change, what_kind: str = "a bias") -> str:
    """Return the message that a plan cannot be merged for lack of a bias, with what to do instead."""
    what, option = ("steering", "steer=0") if isinstance(change, Shift) else ("an anchored edit", "anchored=false")
    return (
        f"{what} needs {what_kind} and {change.site.path} has none: the plan can only run live; "
        f"save it with --save plan or --save adapter, or set excise.{option}"
    )


def edit_parameter(module: nn.Module, changes: Sequence[Change]) -> Lazy:
    """Return a function that computes a site's parameter after all its changes, as the module stores it."""
    site = changes[0].site
    stored = module.get_parameter(site.weight)
    return (
        EditedStack(module, changes, stored) if site.stacked else partial(_edit_matrix, module, changes, site, stored)
    )


def _edit_matrix(module: nn.Module, changes: Sequence[Change], site: Site, like: Tensor) -> Tensor:
    """Return one matrix in its stored layout and dtype."""
    own = select_changes(changes, site)
    return convert_to_stored(edit_module_weight(module, own), site, like) if own else like.detach()


@dataclass(frozen=True)
class EditedStack:
    """Computes a stack of experts with its changes, one expert at a time."""

    module: nn.Module
    changes: Sequence[Change]
    stored: Tensor
    """The unedited stack."""

    def __call__(self) -> Tensor:
        result = torch.empty_like(self.stored, requires_grad=False)
        for expert, matrix in enumerate(self.pieces()):
            result[expert] = matrix
        return result

    def pieces(self) -> Iterator[Tensor]:
        """Yield one expert's edited matrix at a time, holding no other, so that it can be written."""
        changes = fill_donor_means(
            self.module, self.changes
        )  # here, so that no donors' mean is held before its stack's turn
        for expert, site in enumerate(expand_experts(self.module, replace(self.changes[0].site, expert=None))):
            yield _edit_matrix(self.module, changes, site, self.stored[expert])


def bake_in_pieces(value: Lazy) -> Iterator[Tensor]:
    """Yield an edited parameter in pieces along its first axis, each computed on demand."""
    yield from value.pieces() if isinstance(value, EditedStack) else [value()]


def edit_biases(module: nn.Module, changes: Sequence[Change]) -> Tensor | None:
    """Return the bias after all changes, or None; for a stack, one row for each expert."""
    site = changes[0].site
    if not site.stacked:
        return edit_module_bias(module, changes)
    if not has_bias(module, site):
        return None
    changes = fill_donor_means(module, changes)
    experts = expand_experts(module, replace(site, expert=None))
    selected = ((select_changes(changes, expert), expert) for expert in experts)
    biases = (edit_module_bias(module, own) if own else read_bias(module, expert) for own, expert in selected)
    return torch.stack([bias for bias in biases if bias is not None])


def _cast_like_weight(bias: Tensor, module: nn.Module, site: Site) -> Lazy:
    return lambda: bias.to(module.get_parameter(site.weight).dtype)
