"""A plan compiled into weights: one matrix in memory at a time, computed in fp32, cast once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from obliteratus.errors import UserError
from obliteratus.excise.linear import edit_bias, edit_weight
from obliteratus.excise.plan import check_fits
from obliteratus.summon.anatomy import family_of
from obliteratus.summon.codec import read_bias, read_weight, stored
from obliteratus.types import Edit, Plan, Site, Subject

Lazy = Callable[[], Tensor]


def baked(subject: Subject, plan: Plan) -> dict[str, Lazy]:
    """Edited parameters by name, each computed when it is called for, so that none need be held.

    Where an anchored edit needs a bias that the architecture can switch on, the new biases are among them (zeros
    where nothing is anchored), and the configuration must say so too: see `bias_switches`. Raises UserError
    where there is no switch.
    """
    check_fits(subject, plan)
    result: dict[str, Lazy] = _zeros(subject, bias_switches(subject, plan))
    for path, edits in plan.by_site().items():
        module = subject.module(path)
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
        if edit.anchor is None or read_bias(subject.module(edit.site.path), edit.site) is not None:
            continue
        half = edit.site.part.partition(".")[0]
        if half not in switch:
            raise UserError(no_bias(edit.site))
        found[half] = switch[half]
    return found


def _zeros(subject: Subject, halves: Mapping[str, str]) -> dict[str, Lazy]:
    """Zero biases for every site of those halves: the switch gives all of them one."""
    sites = [s for s in subject.sites if s.part.partition(".")[0] in halves]
    widths = {f"{s.path}.bias": _outputs(subject.module(s.path), s) for s in sites}
    return {name: partial(torch.zeros, width, dtype=subject.model.dtype) for name, width in widths.items()}


def _outputs(module: nn.Module, site: Site) -> int:
    return module.get_parameter("weight").shape[0 if site.layout == "linear" else 1]


def no_bias(site: Site) -> str:
    """Why an anchored plan cannot be merged, and what can be done."""
    return (
        f"an anchored edit needs a bias and {site.path} has none: the plan can only run live; "
        "save it with --save plan or --save adapter, or set excise.anchored=false"
    )


def _weight(module: nn.Module, edits: Sequence[Edit]) -> Lazy:
    def compute() -> Tensor:
        weight = read_weight(module, edits[0].site)
        for edit in edits:
            basis = edit.basis.to(weight)
            weight = edit_weight(weight, basis, edit.strength, edit.norm, edit.site.span)
        return stored(weight, edits[0].site, module.get_parameter("weight"))

    return compute


def new_bias(module: nn.Module, edits: Sequence[Edit]) -> Tensor | None:
    """The bias after all edits, fp32; None where there is none and none is needed. It is no head's: spans keep it."""
    bias = read_bias(module, edits[0].site)
    for edit in (e for e in edits if e.site.span is None):
        basis = edit.basis.to(module.get_parameter("weight").device)
        anchor = None if edit.anchor is None else edit.anchor.to(basis)
        bias = edit_bias(bias, basis, edit.strength, anchor)
    return bias


def _value(bias: Tensor, module: nn.Module) -> Lazy:
    return lambda: bias.to(module.get_parameter("weight").dtype)
