"""A plan as live hooks: exact, O(width) a token, no weight copied or dequantized, undone by leaving the block.

Only an edit of one head under a norm rule holds more: the difference of that head's columns; and a norm rule on a
stack of experts: a factor for each of their inputs; and a blend of experts: one matrix, their donors' mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial, singledispatch
from typing import Any

import torch
from torch import Tensor, nn

from obliteratus.core.types import Blend, Change, Edit, Mask, Plan, Shift, Subject, ZeroOutput
from obliteratus.excise.change import apply_change, changes_of_matrix, fill_donors, needs_weight, new_bias, zero_outputs
from obliteratus.excise.linear import Scales, norm_rule_scales, project_matrix, restore_row_lengths
from obliteratus.excise.live.attach import Removable, attach, attach_lazily
from obliteratus.excise.live.ops import LiveOps, Op
from obliteratus.excise.plan import check_fits
from obliteratus.weights.matrices import count_inputs, device_of, each_expert, read_bias, read_weight


@contextmanager
def applied(subject: Subject, plan: Plan) -> Iterator[None]:
    """Inside, the model computes as if the plan were baked into it; afterwards it is untouched, bit for bit."""
    if plan.edits:
        check_fits(subject, plan)
    handles: list[Removable] = []
    try:
        for edits in plan.by_site().values():
            module = subject.module(edits[0].site.path)
            live = partial(compile_changes, module, edits)
            late = needs_stored_weight(subject, edits)
            handles += attach_lazily(module, edits[0].site, live) if late else attach(module, edits[0].site, live())
        yield
    finally:
        for handle in handles:
            handle.remove()


def needs_stored_weight(subject: Subject, changes: Sequence[Change]) -> bool:
    """Whether making changes ready needs a weight that is on disk: then it is done when their block runs, no sooner."""
    needs = not all(map(_plain, changes)) or needs_weight(changes) or any(isinstance(c, Blend) for c in changes)
    return subject.offloaded is not None and needs and changes[0].site.layout != "embedding"


def compile_changes(module: nn.Module, changes: Sequence[Change]) -> LiveOps:
    """Changes of one site, ready to be made; see `_one` and `_stack`."""
    return _stack(module, changes) if changes[0].site.stacked else _one(module, changes)


def _stack(module: nn.Module, changes: Sequence[Change]) -> LiveOps:
    """Experts that lose the same lose it in their weighted sum, biases included. Else each is changed apart."""
    alike = all(_plain(change) and change.site.expert is None for change in changes)
    if changes[0].site.role == "reads" and alike:
        return _one(module, changes)
    if alike:
        return LiveOps(tuple(_summed(change, device_of(module)) for change in changes), (), None, None, None)
    sites = each_expert(module, replace(changes[0].site, expert=None))
    changes = fill_donors(module, changes)
    mine = (changes_of_matrix(changes, site) for site in sites)
    return LiveOps((), (), None, None, None, tuple(_one(module, own) if own else None for own in mine))


def _summed(change: Change, device: torch.device) -> Op:
    """A change of all experts' weighted sum."""
    if isinstance(change, ZeroOutput):
        return _silent(change)
    if not isinstance(change, Shift):
        return _reading(change, device)
    vector = change.vector.to(device, torch.float32)
    return lambda y, args: y + vector


def _one(module: nn.Module, changes: Sequence[Change]) -> LiveOps:
    """Changes of one matrix, ready to be made. The weight is read only where a norm rule needs its lengths, or a head
    its columns; one matrix at a time."""
    site = changes[0].site
    if site.role == "reads":  # the last edit's input is the first to be changed: W P₁P₂ x
        return LiveOps((), tuple(_reading(c, device_of(module)) for c in reversed(changes)), None, None, None)
    bias = read_bias(module, site)
    weight = None if all(_plain(c) for c in changes) else read_weight(module, site).float()
    ops: list[Op] = []
    inputs = None
    for change in changes:
        op, factor = _compiling(change, module, weight, inputs)
        ops += [] if op is None else [op]
        inputs = _times(inputs, factor)
        if weight is not None and change is not changes[-1]:
            weight = apply_change(change, weight)
    after = new_bias(module, changes)
    apart = any(_moves_bias(c) for c in changes)
    return LiveOps(tuple(ops), (), inputs, bias if apart else None, after if apart else None)


def _plain(change: Change) -> bool:
    """Whether the change is made without a look at the weight."""
    return not isinstance(change, Edit) or (change.site.span is None and change.norm == "none")


def _moves_bias(change: Change) -> bool:
    """Whether the bias must be changed apart from the rest of the output."""
    if isinstance(change, Edit):
        return change.site.span is None and (change.norm != "none" or change.anchor is not None)
    return isinstance(change, Shift | Blend)


def _reading(change: Change, device: torch.device) -> Op:
    """An edit of a vector as it is, such as what a reader is given: x ← x − s((x − μ) Aᵀ)B."""
    assert isinstance(change, Edit), "masks and shifts are for writers, masks for single matrices"
    basis, along = (x.to(device, torch.float32) for x in (change.basis, change.along))
    anchor = None if change.anchor is None else change.anchor.to(device, torch.float32)

    def op(x: Tensor, args: tuple[Any, ...]) -> Tensor:
        from_here = x if anchor is None else x - anchor
        return torch.addmm(x, from_here @ along.T, basis, alpha=-change.strength)

    return op


@singledispatch
def _compiling(
    change: Change, module: nn.Module, weight: Tensor | None, inputs: Tensor | None
) -> tuple[Op | None, Tensor | None]:
    """A change of a writer as what it does to the output, and what it scales the inputs by. A shift is all bias."""
    return None, None


@_compiling.register
def _(change: Edit, module: nn.Module, weight: Tensor | None, inputs: Tensor | None) -> tuple[Op, Tensor | None]:
    basis = change.basis.to(device_of(module), torch.float32)
    if change.site.span is not None and weight is not None:
        return _columns(change, change.site.span, basis, weight, inputs), None
    return _whole(change, basis, weight)


@_compiling.register
def _(change: Blend, module: nn.Module, weight: Tensor | None, inputs: Tensor | None) -> tuple[Op, None]:
    """y ← (1 − share)·y + share·M x: before all edits, so that no factor of theirs is in the inputs yet."""
    assert change.weight is not None, "`fill_donors` comes first"
    mean, share = change.weight.float(), change.share
    return lambda y, args: torch.lerp(y, args[0].float().reshape(len(y), -1) @ mean.T, share), None


@_compiling.register
def _(change: ZeroOutput, module: nn.Module, weight: Tensor | None, inputs: Tensor | None) -> tuple[Op, None]:
    return _silent(change), None


def _silent(change: ZeroOutput) -> Op:
    return lambda y, args: zero_outputs(y, change.outputs)


@_compiling.register
def _(change: Mask, module: nn.Module, weight: Tensor | None, inputs: Tensor | None) -> tuple[None, Tensor]:
    whole = torch.ones(count_inputs(module, change.site), device=device_of(module))
    return None, whole.index_fill(0, change.neurons.to(whole.device), 0.0)


def _whole(edit: Edit, basis: Tensor, weight: Tensor | None) -> tuple[Op, Tensor | None]:
    """An edit of all columns, and what it scales the inputs by."""
    oblique = None if edit.covectors is None else edit.covectors.to(basis)
    along = basis if oblique is None else oblique
    factors = (
        Scales()
        if weight is None
        else norm_rule_scales(project_matrix(weight, basis, oblique), basis, edit.strength, edit.norm)
    )
    # An embedding's output is one column of W, so the rule `count_inputs` keeps the output's own length. Its
    # inputs say nothing: OPT's positions take an attention mask, not row numbers.
    keeps = edit.site.layout == "embedding" and edit.norm == "columns"

    def op(y: Tensor, args: tuple[Any, ...]) -> Tensor:
        moved = torch.addmm(y, y @ along.T, basis, alpha=-edit.strength)
        y = restore_row_lengths(y, moved) if keeps else moved
        return y if factors.outputs is None else y * factors.outputs

    return op, None if edit.site.layout == "embedding" else factors.inputs


def _columns(edit: Edit, span: tuple[int, int], basis: Tensor, weight: Tensor, inputs: Tensor | None) -> Op:
    """An edit of one head: y ← y − s(x Vᵀ)B with V = A W of its columns; under a norm rule y ← y + x(W′ − W)ᵀ.

    The input arrives with all factors of whole edits in it; ``weight`` holds those of the edits before this one, so
    these ``inputs`` are divided out.
    """
    taken_at = slice(*span)
    part = weight[:, taken_at]
    if edit.norm == "none":
        down, up = edit.along.to(part) @ part, -edit.strength * basis
    else:
        down, up = apply_change(edit, weight)[:, taken_at] - part, None
    down = down if inputs is None else down / inputs[taken_at]

    def op(y: Tensor, args: tuple[Any, ...]) -> Tensor:
        taken = args[0][..., taken_at].float().reshape(len(y), -1)
        written: Tensor = taken @ down.T
        return y + (written if up is None else written @ up)

    return op


def _times(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a * b
