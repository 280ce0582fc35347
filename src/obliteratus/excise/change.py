"""What one change of a plan does to a matrix and its bias: all that baking, adapters and live hooks agree on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial, singledispatch

import torch
from torch import Tensor, nn

from obliteratus.core.shapes import Float
from obliteratus.core.types import Blend, Change, Edit, Mask, Shift, Site, ZeroOutput
from obliteratus.excise.linear import edit_bias, edit_reader, edit_weight
from obliteratus.weights.matrices import execution_device, read_bias, read_weight

Matrix = Float[Tensor, "out in"]
Bias = Float[Tensor, " out"]


@singledispatch
def apply_change(change: Change, weight: Matrix) -> Matrix:
    """W′, in the dtype and on the device of W [out, in]; W itself is left alone."""
    raise TypeError(f"{type(change).__name__} is no change of a plan")


@apply_change.register
def _(change: Edit, weight: Matrix) -> Matrix:
    basis, along = change.basis.to(weight), None if change.covectors is None else change.covectors.to(weight)
    if change.site.role == "reads":
        return edit_reader(weight, basis, change.strength, along)
    return edit_weight(weight, basis, change.strength, change.norm, change.site.span, along)


@apply_change.register
def _(change: Mask, weight: Matrix) -> Matrix:
    return weight.index_fill(1, change.neurons.to(weight.device), 0.0)


@apply_change.register
def _(change: Shift, weight: Matrix) -> Matrix:
    return weight


@apply_change.register
def _(change: Blend, weight: Matrix) -> Matrix:
    assert change.weight is not None, "`fill_donor_means` comes first"
    return torch.lerp(weight, change.weight.to(weight), change.share)


@apply_change.register
def _(change: ZeroOutput, weight: Matrix) -> Matrix:
    return zero_outputs(weight.T, change.outputs).T


def zero_outputs(values: Float[Tensor, "*n out"], outputs: Tensor | None) -> Float[Tensor, "*n out"]:
    """Zeros at these places of the last axis; None is all of them."""
    return torch.zeros_like(values) if outputs is None else values.index_fill(-1, outputs.to(values.device), 0.0)


@singledispatch
def apply_to_bias(change: Change, bias: Bias | None, weight: Matrix | None) -> Bias | None:
    """b′; None where there is none and none is needed. weight: W before this change; only anchored readers look."""
    raise TypeError(f"{type(change).__name__} is no change of a plan")


@apply_to_bias.register
def _(change: Edit, bias: Bias | None, weight: Matrix | None) -> Bias | None:
    site, anchor = change.site, change.anchor
    if site.role == "reads":
        return bias if anchor is None or weight is None else _read_anchor(change, anchor, bias, weight)
    if site.span is not None:  # a bias is no head's
        return bias
    like = bias if bias is not None else anchor if anchor is not None else change.basis
    basis, along = change.basis.to(like), None if change.covectors is None else change.covectors.to(like)
    return edit_bias(bias, basis, change.strength, None if anchor is None else anchor.to(like), along)


@apply_to_bias.register
def _(change: Mask, bias: Bias | None, weight: Matrix | None) -> Bias | None:
    return bias


@apply_to_bias.register
def _(change: Shift, bias: Bias | None, weight: Matrix | None) -> Bias | None:
    return change.vector if bias is None else bias + change.vector.to(bias)


@apply_to_bias.register
def _(change: Blend, bias: Bias | None, weight: Matrix | None) -> Bias | None:
    return bias if bias is None or change.bias is None else torch.lerp(bias, change.bias.to(bias), change.share)


@apply_to_bias.register
def _(change: ZeroOutput, bias: Bias | None, weight: Matrix | None) -> Bias | None:
    return None if bias is None else zero_outputs(bias, change.outputs)


def fill_donor_means(module: nn.Module, changes: Sequence[Change]) -> tuple[Change, ...]:
    """Blends with their donors' mean, taken from the module: one matrix for all that have the same donors."""
    return fill_donor_means_from(changes, partial(read_weight, module), partial(read_bias, module))


def fill_donor_means_from(
    changes: Sequence[Change], matrix: Callable[[Site], Matrix], bias: Callable[[Site], Bias | None]
) -> tuple[Change, ...]:
    """The same, from wherever an expert's matrix and bias are read."""
    means: dict[tuple[int, ...], tuple[Matrix, Bias | None]] = {}

    def whole(change: Change) -> Change:
        if not isinstance(change, Blend):
            return change
        donors = tuple(change.donors.tolist())
        if donors not in means:
            sites = [replace(change.site, expert=donor) for donor in donors]
            biases = [bias(site) for site in sites]
            means[donors] = average_experts(matrix, sites), _mean([b for b in biases if b is not None])
        weight, shift = means[donors]
        return replace(change, weight=weight, bias=shift)

    return tuple(map(whole, changes))


def average_experts(matrix: Callable[[Site], Matrix], sites: Sequence[Site]) -> Matrix:
    """The mean of some experts' matrices, each read once and none held."""
    mean = torch.zeros_like(matrix(sites[0]))
    for number, site in enumerate(sites, 1):
        mean += (matrix(site) - mean) / number
    return mean


def _mean(biases: Sequence[Bias]) -> Bias | None:
    return torch.stack(list(biases)).mean(0) if biases else None


def _read_anchor(change: Edit, anchor: Tensor, bias: Bias | None, weight: Matrix) -> Bias:
    """x ← x − s Bᵀ(A(x − μ)) adds s W Bᵀ(A μ) to what W puts out."""
    kept = change.strength * (weight @ change.basis.to(weight).T) @ (change.along @ anchor.to(change.basis)).to(weight)
    return kept if bias is None else bias + kept.to(bias)


def needs_weight(changes: Sequence[Change]) -> bool:
    """Whether the new bias depends on the weight: only where a reader keeps an anchor."""
    return any(isinstance(c, Edit) and c.site.role == "reads" and c.anchor is not None for c in changes)


def needs_bias(change: Change) -> bool:
    """Whether a module without a bias must get one for this change to be baked."""
    return isinstance(change, Shift) or (isinstance(change, Edit) and change.anchor is not None)


def select_changes(changes: Sequence[Change], site: Site) -> tuple[Change, ...]:
    """The changes that one matrix gets, in their order: of a stack, those of all experts and of this one."""
    mine = (c for c in changes if c.site.expert in (None, site.expert))
    return tuple(replace(c, site=replace(c.site, expert=site.expert)) for c in mine)


def edit_module_weight(module: nn.Module, changes: Sequence[Change]) -> Matrix:
    """The matrix after all changes, fp32 (fp64 where stored so). Of a stack, those `select_changes` one expert."""
    weight = read_weight(module, changes[0].site)
    for change in changes:
        weight = apply_change(change, weight)
    return weight


def edit_module_bias(module: nn.Module, changes: Sequence[Change]) -> Bias | None:
    """The bias after all changes, fp32; None where there is none and none is needed."""
    return edit_bias_with_weight(
        module, changes, read_weight(module, changes[0].site) if needs_weight(changes) else None
    )


def edit_bias_with_weight(module: nn.Module, changes: Sequence[Change], weight: Matrix | None) -> Bias | None:
    """The same, given W before the changes, which only `needs_weight` needs."""
    bias = read_bias(module, changes[0].site)
    device = execution_device(module)
    for change in changes:
        bias = apply_to_bias(change, bias, weight)
        weight = None if weight is None else apply_change(change, weight)
    return None if bias is None else bias.to(device)


def compute_bias_difference(module: nn.Module, changes: Sequence[Change]) -> Bias | None:
    """What an adapter must add to the output, fp32 [out]; None where nothing."""
    after, before = edit_module_bias(module, changes), read_bias(module, changes[0].site)
    if after is None or before is None:
        return after
    return None if torch.equal(after, before) else after - before
