"""A plan compiled into weights: one matrix in memory at a time, of a stack too, computed in fp32, cast once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
    """Edited parameters by name, each computed when it is called for, so that none need be held.

    Where an anchored edit needs a bias that the architecture can switch on, the new biases are among them (zeros
    where nothing is anchored), and the configuration must say so too: see `find_bias_switches`. Raises UserError
    where there is no switch. A packed matrix is unpacked once, for all its changes and its bias, and packed once; what
    that loses is added to ``losses``.
    """
    check_fits(subject, plan)
    result: dict[str, Lazy] = _zeros(subject, find_bias_switches(subject, plan))
    for name, edits in plan.by_site().items():
        site = edits[0].site
        module = subject.module(site.path)
        if is_packed(module):
            result |= requantize_module(site.path, module, edits, subject.model.dtype, losses)
            continue
        result[name] = edit_parameter(module, edits)
        bias = edit_biases(module, edits)
        if bias is not None:
            result[f"{site.path}.{site.bias}"] = _value(bias, module, site)
    return result


def find_bias_switches(subject: Subject, plan: Plan) -> dict[str, str]:
    """``attn`` or ``mlp`` → configuration key to set, for each half that gets biases it does not have."""
    found: dict[str, str] = {}
    family = find_architecture(subject.model.config)
    for edit in filter(needs_bias, plan.edits):
        there = has_bias(subject.module(edit.site.path), edit.site)
        half = edit.site.part.partition(".")[0]
        if there and edit.site.stacked and not family.routing_sums_to_one:
            raise UserError(missing_bias_error(edit, "one that routing does not scale"))
        if not there and half not in family.bias_switch:
            raise UserError(missing_bias_error(edit))
        if not there:
            found[half] = family.bias_switch[half]
    return found


def can_hold_anchors(subject: Subject, sites: Iterable[Site]) -> bool:
    """Whether saved weights can hold an anchored edit at each of these sites: in a bias that they have, or can get."""
    family = find_architecture(subject.model.config)

    def holds(site: Site) -> bool:
        if has_bias(subject.module(site.path), site):
            return family.routing_sums_to_one or not site.stacked
        return site.part.partition(".")[0] in family.bias_switch

    return all(map(holds, sites))


def _zeros(subject: Subject, halves: Mapping[str, str]) -> dict[str, Lazy]:
    """Zero biases for every site of those halves: the switch gives all of them one."""
    sites = [s for s in subject.sites if s.part.partition(".")[0] in halves]
    widths = {f"{s.path}.{s.bias}": count_outputs(subject.module(s.path), s) for s in sites}
    return {name: partial(torch.zeros, width, dtype=subject.model.dtype) for name, width in widths.items()}


def missing_bias_error(change: Change, what_kind: str = "a bias") -> str:
    """Why a plan cannot be merged, and what can be done."""
    what, option = ("steering", "steer=0") if isinstance(change, Shift) else ("an anchored edit", "anchored=false")
    return (
        f"{what} needs {what_kind} and {change.site.path} has none: the plan can only run live; "
        f"save it with --save plan or --save adapter, or set excise.{option}"
    )


def edit_parameter(module: nn.Module, changes: Sequence[Change]) -> Lazy:
    """The matrix of a site after all its changes, a stack whole, as the module stores it."""
    site = changes[0].site
    whole = module.get_parameter(site.weight)
    return EditedStack(module, changes, whole) if site.stacked else partial(_new, module, changes, site, whole)


def _new(module: nn.Module, changes: Sequence[Change], site: Site, like: Tensor) -> Tensor:
    """One matrix as it is to be stored."""
    mine = select_changes(changes, site)
    return convert_to_stored(edit_module_weight(module, mine), site, like) if mine else like.detach()


@dataclass(frozen=True)
class EditedStack:
    """All experts of one stack, edited one by one."""

    module: nn.Module
    changes: Sequence[Change]
    whole: Tensor
    """The stack as it is."""

    def __call__(self) -> Tensor:
        result = torch.empty_like(self.whole, requires_grad=False)
        for expert, matrix in enumerate(self.pieces()):
            result[expert] = matrix
        return result

    def pieces(self) -> Iterator[Tensor]:
        """One expert's matrix at a time, and nothing else held: for writing."""
        changes = fill_donor_means(
            self.module, self.changes
        )  # here, so that no donors' mean is held before its stack's turn
        for expert, site in enumerate(expand_experts(self.module, replace(self.changes[0].site, expert=None))):
            yield _new(self.module, changes, site, self.whole[expert])


def bake_in_pieces(value: Lazy) -> Iterator[Tensor]:
    """An edited parameter in parts along its first axis, each computed when it is asked for."""
    yield from value.pieces() if isinstance(value, EditedStack) else [value()]


def edit_biases(module: nn.Module, changes: Sequence[Change]) -> Tensor | None:
    """The bias after all changes; of a stack, one for each expert."""
    site = changes[0].site
    if not site.stacked:
        return edit_module_bias(module, changes)
    if not has_bias(module, site):
        return None
    changes = fill_donor_means(module, changes)
    mine = ((select_changes(changes, one), one) for one in expand_experts(module, replace(site, expert=None)))
    made = (edit_module_bias(module, own) if own else read_bias(module, one) for own, one in mine)
    return torch.stack([bias for bias in made if bias is not None])


def _value(bias: Tensor, module: nn.Module, site: Site) -> Lazy:
    return lambda: bias.to(module.get_parameter(site.weight).dtype)
