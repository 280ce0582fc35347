"""A plan compiled into weights: one matrix in memory at a time, computed in fp32, cast once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from obliteratus.errors import UserError
from obliteratus.excise.change import needs_bias, new_bias, new_weight
from obliteratus.excise.packed import Losses, packed_entries
from obliteratus.excise.plan import check_fits
from obliteratus.summon.anatomy import family_of
from obliteratus.summon.codec import extent, read_bias, stored
from obliteratus.summon.quantised import is_packed
from obliteratus.types import Change, Plan, Shift, Subject

Lazy = Callable[[], Tensor]


def baked(subject: Subject, plan: Plan, losses: Losses | None = None) -> dict[str, Lazy]:
    """Edited parameters by name, each computed when it is called for, so that none need be held.

    Where an anchored edit needs a bias that the architecture can switch on, the new biases are among them (zeros
    where nothing is anchored), and the configuration must say so too: see `bias_switches`. Raises UserError
    where there is no switch. A packed matrix is unpacked once, for all its changes and its bias, and packed once; what
    that loses is added to ``losses``.
    """
    check_fits(subject, plan)
    result: dict[str, Lazy] = _zeros(subject, bias_switches(subject, plan))
    for path, edits in plan.by_site().items():
        module = subject.module(path)
        if is_packed(module):
            result |= packed_entries(path, module, edits, subject.model.dtype, losses)
            continue
        result[f"{path}.weight"] = _weight(module, edits)
        bias = new_bias(module, edits)
        if bias is not None:
            result[f"{path}.bias"] = _value(bias, module)
    return result


def bias_switches(subject: Subject, plan: Plan) -> dict[str, str]:
    """``attn`` or ``mlp`` → configuration key to set, for each half that gets biases it does not have."""
    found: dict[str, str] = {}
    switch = family_of(subject.model.config).bias_switch
    for edit in plan.edits:
        if not needs_bias(edit) or read_bias(subject.module(edit.site.path), edit.site) is not None:
            continue
        half = edit.site.part.partition(".")[0]
        if half not in switch:
            raise UserError(no_bias(edit))
        found[half] = switch[half]
    return found


def _zeros(subject: Subject, halves: Mapping[str, str]) -> dict[str, Lazy]:
    """Zero biases for every site of those halves: the switch gives all of them one."""
    sites = [s for s in subject.sites if s.part.partition(".")[0] in halves]
    widths = {f"{s.path}.bias": extent(subject.module(s.path), s)[0] for s in sites}
    return {name: partial(torch.zeros, width, dtype=subject.model.dtype) for name, width in widths.items()}


def no_bias(change: Change) -> str:
    """Why a plan cannot be merged, and what can be done."""
    what, option = ("steering", "steer=0") if isinstance(change, Shift) else ("an anchored edit", "anchored=false")
    return (
        f"{what} needs a bias and {change.site.path} has none: the plan can only run live; "
        f"save it with --save plan or --save adapter, or set excise.{option}"
    )


def _weight(module: nn.Module, changes: Sequence[Change]) -> Lazy:
    return lambda: stored(new_weight(module, changes), changes[0].site, module.get_parameter("weight"))


def _value(bias: Tensor, module: nn.Module) -> Lazy:
    return lambda: bias.to(module.get_parameter("weight").dtype)
