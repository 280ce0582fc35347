"""What each kind of change does to a matrix and its bias. Baking, adapters and live hooks all use these functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial, singledispatch

import torch
from torch import Tensor, nn

from obliteratus.core.shapes import Float
from obliteratus.core.types import Blend, Change, Edit, Mask, Shift, Site, ZeroOutput
from obliteratus.excise.linear import edit_bias, edit_reader, edit_weight, kept_of_anchor
from obliteratus.weights.matrices import execution_device, read_bias, read_weight

Matrix = Float[Tensor, "out in"]
Bias = Float[Tensor, " out"]


@singledispatch
def apply_change(change: Change, weight: Matrix) -> Matrix:
    """Return W′ in the dtype and on the device of W [out, in]; W itself is not modified."""
    raise TypeError(f"{type(change).__name__} is not a change of a plan")


@apply_change.register
def _(change: Edit, weight: Matrix) -> Matrix:
    basis, along = change.basis.to(weight), None if change.covectors is None else change.covectors.to(weight)
    if change.site.role == "reads":
        return edit_reader(weight, basis, change.strength, along)
    edited = edit_weight(weight, basis, change.strength, change.norm, change.site.span, along)
    if change.anchor is None or change.site.layout != "embedding":
        return edited
    return edited + kept_of_anchor(change.anchor.to(weight), basis, change.strength, along)[:, None]


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
    """Return the values with these places of the last axis set to zero; None means all places."""
    return torch.zeros_like(values) if outputs is None else values.index_fill(-1, outputs.to(values.device), 0.0)


@singledispatch
def apply_to_bias(change: Change, bias: Bias | None, weight: Matrix | None) -> Bias | None:
    """Return b′, or None if there is no bias and none is needed. weight: W before this change, for anchored readers."""
    raise TypeError(f"{type(change).__name__} is not a change of a plan")


@apply_to_bias.register
def _(change: Edit, bias: Bias | None, weight: Matrix | None) -> Bias | None:
    site, anchor = change.site, change.anchor
    if site.role == "reads":
        return bias if anchor is None or weight is None else _keep_reader_anchor(change, anchor, bias, weight)
    if (
        site.span is not None or site.layout == "embedding"
    ):  # a bias belongs to no single head, and embeddings have none
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
    """Return the changes with each blend's donor mean read from the module: one matrix for equal donors."""
    return fill_donor_means_from(changes, partial(read_weight, module), partial(read_bias, module))


def fill_donor_means_from(
    changes: Sequence[Change], matrix: Callable[[Site], Matrix], bias: Callable[[Site], Bias | None]
) -> tuple[Change, ...]:
    """Do the same as `fill_donor_means` with functions that read an expert's matrix and bias."""
    means: dict[tuple[int, ...], tuple[Matrix, Bias | None]] = {}

    def fill(change: Change) -> Change:
        if not isinstance(change, Blend):
            return change
        donors = tuple(change.donors.tolist())
        if donors not in means:
            sites = [replace(change.site, expert=donor) for donor in donors]
            biases = [bias(site) for site in sites]
            means[donors] = average_experts(matrix, sites), _mean([b for b in biases if b is not None])
        weight, shift = means[donors]
        return replace(change, weight=weight, bias=shift)

    return tuple(map(fill, changes))


def average_experts(matrix: Callable[[Site], Matrix], sites: Sequence[Site]) -> Matrix:
    """Return the mean of some experts' matrices, holding one of them at a time."""
    mean = torch.zeros_like(matrix(sites[0]))
    for number, site in enumerate(sites, 1):
        mean += (matrix(site) - mean) / number
    return mean


def _mean(biases: Sequence[Bias]) -> Bias | None:
    return torch.stack(list(biases)).mean(0) if biases else None


def _keep_reader_anchor(change: Edit, anchor: Tensor, bias: Bias | None, weight: Matrix) -> Bias:
    """Return the bias of a reader whose anchor stays: x ← x − s Bᵀ(A(x − μ)) adds s W Bᵀ(A μ) to the output."""
    shift = change.strength * (weight @ change.basis.to(weight).T) @ (change.along @ anchor.to(change.basis)).to(weight)
    return shift if bias is None else bias + shift.to(bias)


def needs_weight(changes: Sequence[Change]) -> bool:
    """Return whether the new bias depends on the weight, which it does only for a reader with an anchor."""
    return any(isinstance(c, Edit) and c.site.role == "reads" and c.anchor is not None for c in changes)


def needs_bias(change: Change) -> bool:
    """Return whether a module without a bias must get one for this change to be baked. An embedding needs none."""
    anchored = isinstance(change, Edit) and change.anchor is not None
    return isinstance(change, Shift) or (anchored and change.site.layout != "embedding")


def select_changes(changes: Sequence[Change], site: Site) -> tuple[Change, ...]:
    """Return the changes of one matrix in their order: in a stack, those of all experts and of this one."""
    own = (c for c in changes if c.site.expert in (None, site.expert))
    return tuple(replace(c, site=replace(c.site, expert=site.expert)) for c in own)


def edit_module_weight(module: nn.Module, changes: Sequence[Change]) -> Matrix:
    """Return the matrix after all changes, fp32 (fp64 if stored so); for a stack, after one expert's own changes."""
    weight = read_weight(module, changes[0].site)
    for change in changes:
        weight = apply_change(change, weight)
    return weight


def edit_module_bias(module: nn.Module, changes: Sequence[Change]) -> Bias | None:
    """Return the bias after all changes, fp32, or None if there is none and none is needed."""
    return edit_bias_with_weight(
        module, changes, read_weight(module, changes[0].site) if needs_weight(changes) else None
    )


def edit_bias_with_weight(module: nn.Module, changes: Sequence[Change], weight: Matrix | None) -> Bias | None:
    """Do the same as `edit_module_bias` with W before the changes, needed only if `needs_weight` says so."""
    bias = read_bias(module, changes[0].site)
    device = execution_device(module)
    for change in changes:
        bias = apply_to_bias(change, bias, weight)
        weight = None if weight is None else apply_change(change, weight)
    return None if bias is None else bias.to(device)


def compute_bias_difference(module: nn.Module, changes: Sequence[Change]) -> Bias | None:
    """Return what an adapter must add to the output, fp32 [out], or None if nothing."""
    after, before = edit_module_bias(module, changes), read_bias(module, changes[0].site)
    if after is None or before is None:
        return after
    return None if torch.equal(after, before) else after - before
