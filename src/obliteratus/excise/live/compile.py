"""Changes of a plan compiled into what they do to the inputs and outputs of a module while it runs.

Operations cost O(width) a token and copy no weight, with four exceptions: an edit of one head under a norm rule holds
the difference of that head's columns, a change of low rank its two factors, a norm rule on a stack of experts a factor
for each of their inputs, and a blend of experts the donors' mean matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import singledispatch
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from obliteratus.core.types import Blend, Change, Edit, Mask, Shift, Site, Subject, ZeroOutput
from obliteratus.excise.change import (
    apply_change,
    edit_module_bias,
    fill_donor_means,
    needs_weight,
    select_changes,
    zero_outputs,
)
from obliteratus.excise.linear import (
    MatrixProjections,
    Scales,
    compute_norm_scales,
    factorize_low_rank,
    kept_of_anchor,
    project_matrix,
    project_unit_rows,
    restore_row_lengths,
)
from obliteratus.summon.experts import run_experts
from obliteratus.weights.matrices import count_inputs, execution_device, expand_experts, read_bias, read_weight

Op = Callable[[Tensor, tuple[Any, ...]], Tensor]
"""(values so far [tokens, width], the module's arguments) → values; fp32. Only edits of one head, changes of low
rank and blends read the arguments."""


@dataclass(frozen=True)
class LiveOps:
    """What changes do to one module: y′ = output_ops(y − old_bias) + new_bias. All fp32 on the module's device."""

    output_ops: tuple[Op, ...] = ()
    input_ops: tuple[Op, ...] = ()
    """Operations on the input, after ``input_scale``."""
    input_scale: Tensor | None = None
    """Factor of each input coordinate; None is all ones."""
    old_bias: Tensor | None = None
    """Subtracted from the output before its operations; None where that makes no difference."""
    new_bias: Tensor | None = None
    """Added to the output after its operations."""
    experts: tuple[LiveOps | None, ...] = ()
    """Operations of each expert of a stack whose experts are changed differently; then all else is empty."""


@dataclass(frozen=True)
class NormReading:
    """What an edit of a whole matrix under a norm rule reads of its weight, whatever its strength."""

    basis: Tensor
    oblique: Tensor | None
    projections: MatrixProjections


NormReadings = dict[tuple[str, int | None], NormReading]
"""Parameter and expert of each matrix → what the one edit of it under a norm rule has read of it."""


# ------------------------------------------------------------------------------------------- running
def edit_input(x: Tensor, live: LiveOps) -> Tensor:
    """Return the input of a module after its changes. x: [..., width]."""
    if live.input_scale is not None:
        x = x * live.input_scale.to(x.dtype)
    if not live.input_ops:
        return x
    flat = x.float().reshape(-1, x.shape[-1])
    for op in live.input_ops:
        flat = op(flat, (x,))
    return flat.view(x.shape).to(x.dtype)


def edit_output(y: Tensor, args: tuple[Any, ...], live: LiveOps) -> Tensor:
    """Return the output of a module after its changes. y: fp32 [..., width]. args: the module's own arguments."""
    flat = y.reshape(-1, y.shape[-1])
    if live.old_bias is not None:
        flat = flat - live.old_bias
    for op in live.output_ops:
        flat = op(flat, args)
    return (flat if live.new_bias is None else flat + live.new_bias).view(y.shape)


def run_edited_experts(module: nn.Module, site: Site, live: LiveOps, args: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Run a stack of experts on its arguments (tokens, chosen experts, their weights), each under its own changes."""

    def change_input(expert: int, h: Tensor) -> Tensor:
        own = live.experts[expert]
        return h if own is None else edit_input(h, own)

    def change_output(expert: int, h: Tensor, y: Tensor) -> Tensor:
        own = live.experts[expert]
        return y if own is None else edit_output(y.float(), (h,), own).to(y.dtype)

    return run_experts(module, site, args, change_input, change_output)


# ----------------------------------------------------------------------------------------- compiling
def needs_stored_weight(subject: Subject, changes: Sequence[Change]) -> bool:
    """Return whether compiling the changes of one site needs a weight on disk: then they are compiled when it runs."""
    needs = (
        not all(map(_ignores_weight, changes)) or needs_weight(changes) or any(isinstance(c, Blend) for c in changes)
    )
    return subject.offloaded is not None and needs and changes[0].site.layout != "embedding"


def compile_changes(module: nn.Module, changes: Sequence[Change], readings: NormReadings | None = None) -> LiveOps:
    """Return the operations of all changes of one site, in their order.

    readings: of the same changes at other strengths, which spare a pass over the weight; what is missing is added.
    """
    compile_all = _compile_stack if changes[0].site.stacked else _compile_matrix
    return compile_all(module, changes, readings)


def _compile_stack(module: nn.Module, changes: Sequence[Change], readings: NormReadings | None = None) -> LiveOps:
    """Experts that all lose the same lose it in their weighted sum, biases included; others are changed one by one."""
    alike = all(_ignores_weight(change) and change.site.expert is None for change in changes)
    if changes[0].site.role == "reads" and alike:
        return _compile_matrix(module, changes)
    if alike:
        return LiveOps(tuple(_change_sum(change, execution_device(module)) for change in changes))
    sites = expand_experts(module, replace(changes[0].site, expert=None))
    changes = fill_donor_means(module, changes)
    by_expert = (select_changes(changes, site) for site in sites)
    return LiveOps(experts=tuple(_compile_matrix(module, own, readings) if own else None for own in by_expert))


def _change_sum(change: Change, device: torch.device) -> Op:
    """Return what a change of all experts does to their weighted sum."""
    if isinstance(change, ZeroOutput):
        return _zero(change)
    if not isinstance(change, Shift):
        return _project(change, device)
    vector = change.vector.to(device, torch.float32)
    return lambda y, args: y + vector


def _compile_matrix(module: nn.Module, changes: Sequence[Change], readings: NormReadings | None = None) -> LiveOps:
    """Compile the changes of one matrix. Its weight is read only for a norm rule or an edit of one head."""
    site = changes[0].site
    if site.role == "reads":  # the last edit's input is the first to be changed: W P₁P₂ x
        return LiveOps(input_ops=tuple(_project(c, execution_device(module)) for c in reversed(changes)))
    if readings is not None and len(changes) == 1 and _has_reading(changes[0]):
        edit, factor = _compile_from_reading(module, changes[0], readings)
        return _with_bias(module, changes, (edit,), factor)
    weight = None if all(_ignores_weight(c) for c in changes) else read_weight(module, site).float()
    ops: list[Op] = []
    scale = None
    for change in changes:
        op, factor = _compile(change, module, weight, scale)
        ops += [] if op is None else [op]
        scale = _multiply(scale, factor)
        if weight is not None and change is not changes[-1]:
            weight = apply_change(change, weight)
    return _with_bias(module, changes, tuple(ops), scale)


def _with_bias(module: nn.Module, changes: Sequence[Change], ops: tuple[Op, ...], scale: Tensor | None) -> LiveOps:
    if not any(_changes_bias_apart(c) for c in changes):
        return LiveOps(ops, (), scale)
    return LiveOps(ops, (), scale, read_bias(module, changes[0].site), edit_module_bias(module, changes))


def _has_reading(change: Change) -> TypeGuard[Edit]:
    """Whether all that the change needs of the weight can be kept from one strength to the next."""
    return isinstance(change, Edit) and change.site.span is None and change.norm not in ("none", "unit_rows_rank_3")


def _compile_from_reading(module: nn.Module, edit: Edit, readings: NormReadings) -> tuple[Op, Tensor | None]:
    key = (edit.site.parameter, edit.site.expert)
    if key not in readings:
        basis = edit.basis.to(execution_device(module), torch.float32)
        readings[key] = _read_for_norm(edit, basis, read_weight(module, edit.site).float())
    return _edit_all_columns(edit, readings[key].basis, readings[key])


def _ignores_weight(change: Change) -> bool:
    """Whether the change can be made without reading the weight."""
    return not isinstance(change, Edit) or (change.site.span is None and change.norm == "none")


def _changes_bias_apart(change: Change) -> bool:
    """Whether the bias must be changed apart from the rest of the output."""
    if isinstance(change, Edit):
        whole = change.site.span is None and change.site.layout != "embedding"
        return whole and (change.norm != "none" or change.anchor is not None)
    return isinstance(change, Shift | Blend)


def _project(change: Change, device: torch.device) -> Op:
    """Return the edit x ← x − s((x − μ) Aᵀ)B of a vector as it is, such as the input of a reader."""
    assert isinstance(change, Edit), "masks and shifts are for writers, masks for single matrices"
    basis, along = (x.to(device, torch.float32) for x in (change.basis, change.along))
    anchor = None if change.anchor is None else change.anchor.to(device, torch.float32)

    def op(x: Tensor, args: tuple[Any, ...]) -> Tensor:
        offset = x if anchor is None else x - anchor
        return torch.addmm(x, offset @ along.T, basis, alpha=-change.strength)

    return op


def _zero(change: ZeroOutput) -> Op:
    return lambda y, args: zero_outputs(y, change.outputs)


@singledispatch
def _compile(
    change: Change, module: nn.Module, weight: Tensor | None, scale: Tensor | None
) -> tuple[Op | None, Tensor | None]:
    """Return what a change of a writer does to the output, and the factors of its inputs. A shift is all bias."""
    return None, None


@_compile.register
def _(change: Edit, module: nn.Module, weight: Tensor | None, scale: Tensor | None) -> tuple[Op, Tensor | None]:
    basis = change.basis.to(execution_device(module), torch.float32)
    if weight is not None and (change.site.span is not None or change.norm == "unit_rows_rank_3"):
        return _edit_columns(change, basis, weight, scale), None
    return _edit_all_columns(change, basis, None if weight is None else _read_for_norm(change, basis, weight))


@_compile.register
def _(change: Blend, module: nn.Module, weight: Tensor | None, scale: Tensor | None) -> tuple[Op, None]:
    """y ← (1 − share)·y + share·M x. Blends precede all edits, so that the inputs hold no factor of theirs yet."""
    assert change.weight is not None, "`fill_donor_means` comes first"
    mean, share = change.weight.float(), change.share
    return lambda y, args: torch.lerp(y, args[0].float().reshape(len(y), -1) @ mean.T, share), None


@_compile.register
def _(change: ZeroOutput, module: nn.Module, weight: Tensor | None, scale: Tensor | None) -> tuple[Op, None]:
    return _zero(change), None


@_compile.register
def _(change: Mask, module: nn.Module, weight: Tensor | None, scale: Tensor | None) -> tuple[None, Tensor]:
    ones = torch.ones(count_inputs(module, change.site), device=execution_device(module))
    return None, ones.index_fill(0, change.neurons.to(ones.device), 0.0)


def _read_for_norm(edit: Edit, basis: Tensor, weight: Tensor) -> NormReading:
    """Return what an edit of a whole matrix needs of its weight."""
    oblique = None if edit.covectors is None else edit.covectors.to(basis)
    if edit.norm == "unit_rows":
        basis, oblique = project_unit_rows(weight, basis, oblique)
    return NormReading(basis, oblique, project_matrix(weight, basis, oblique))


def _edit_all_columns(edit: Edit, basis: Tensor, reading: NormReading | None) -> tuple[Op, Tensor | None]:
    """Return an edit of a whole matrix, and the factors of its inputs. reading: where a norm rule needs one."""
    oblique = None if edit.covectors is None else edit.covectors.to(basis)
    kept = None
    if edit.anchor is not None and edit.site.layout == "embedding":
        kept = kept_of_anchor(edit.anchor.to(basis), basis, edit.strength, oblique)
    scales = Scales()
    if reading is not None:
        basis, oblique = reading.basis, reading.oblique
        scales = compute_norm_scales(reading.projections, basis, edit.strength, edit.norm)
    along = basis if oblique is None else oblique
    # An embedding's output is one column of W, so the rule `columns` keeps the output's own length. Its
    # inputs say nothing: OPT's positions take an attention mask, not row numbers.
    keeps_length = edit.site.layout == "embedding" and edit.norm == "columns"

    def op(y: Tensor, args: tuple[Any, ...]) -> Tensor:
        projected = torch.addmm(y, y @ along.T, basis, alpha=-edit.strength)
        y = restore_row_lengths(y, projected) if keeps_length else projected
        y = y if scales.outputs is None else y * scales.outputs
        return y if kept is None else y + kept

    return op, None if edit.site.layout == "embedding" else scales.inputs


def _edit_columns(edit: Edit, basis: Tensor, weight: Tensor, scale: Tensor | None) -> Op:
    """Return an edit that reads the input, of one head or of a change of low rank: y ← y + (x downᵀ)upᵀ.

    The input arrives multiplied by the factors of all edits of the whole matrix, while ``weight`` holds those of the
    edits before this one only; these, ``scale``, are divided out.
    """
    columns = slice(None) if edit.site.span is None else slice(*edit.site.span)
    down, up = _factorize(edit, basis, weight[:, columns])
    down = down if scale is None else down / scale[columns]

    def op(y: Tensor, args: tuple[Any, ...]) -> Tensor:
        x = args[0][..., columns].float().reshape(len(y), -1)
        written: Tensor = x @ down.T
        return y + (written if up is None else written @ up.T)

    return op


def _factorize(edit: Edit, basis: Tensor, part: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return down [r, in] and up [out, r], whose product is the change of these columns; up None stands for I."""
    if edit.norm == "none":
        return edit.along.to(part) @ part, -edit.strength * basis.T
    if edit.norm == "unit_rows_rank_3":
        oblique = None if edit.covectors is None else edit.covectors.to(part)
        up, down = factorize_low_rank(part, basis, edit.strength, oblique)
        return down, up
    whole = replace(edit, site=replace(edit.site, span=None))
    return apply_change(whole, part) - part, None


def _multiply(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a * b
