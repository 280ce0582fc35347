"""A plan as live hooks: exact, O(width) a token, no weight copied or dequantised, undone by leaving the block.

Only an edit of one head under a norm rule holds more: the difference of that head's columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from obliteratus.excise.linear import Scales, edit_bias, edit_weight, measure, restretched, scales
from obliteratus.excise.plan import check_fits
from obliteratus.summon.codec import read_bias, read_weight
from obliteratus.types import Edit, Plan, Subject


@contextmanager
def applied(subject: Subject, plan: Plan) -> Iterator[None]:
    """Inside, the model computes as if the plan were baked into it; afterwards it is untouched, bit for bit."""
    if plan.edits:
        check_fits(subject, plan)
    handles: list[RemovableHandle] = []
    try:
        for path, edits in plan.by_site().items():
            module = subject.module(path)
            handles += _attach(module, _compiled(module, edits))
        yield
    finally:
        for handle in handles:
            handle.remove()


Op = Callable[[Tensor, tuple[Any, ...]], Tensor]
"""(output so far [tokens, out], the module's arguments) → output; fp32. Only edits of one head look at arguments."""


@dataclass(frozen=True)
class _Live:
    """y′ = ops(y − b) + b′, on inputs scaled by ``inputs``. All of them fp32 on the module's device."""

    ops: tuple[Op, ...]
    inputs: Tensor | None
    before: Tensor | None
    """b, taken off first; None where that makes no difference."""
    after: Tensor | None
    """b′, added last."""


def _compiled(module: nn.Module, edits: Sequence[Edit]) -> _Live:
    """The weight is read only where a norm rule needs its lengths, or a head its columns; one matrix at a time."""
    site, bias = edits[0].site, read_bias(module, edits[0].site)
    plain = all(e.site.span is not None or (e.norm == "none" and e.anchor is None) for e in edits)
    unread = all(e.site.span is None and e.norm == "none" for e in edits)
    weight = None if unread else read_weight(module, site).float()
    ops, inputs, new_bias = [], None, bias
    for edit in edits:
        basis = edit.basis.to(_device(module), torch.float32)
        if edit.site.span is not None and weight is not None:
            ops.append(_columns(edit, edit.site.span, basis, weight, inputs))
        else:
            op, factor = _whole(edit, basis, weight)
            ops.append(op)
            inputs = _times(inputs, factor)
            new_bias = edit_bias(new_bias, basis, edit.strength, None if edit.anchor is None else edit.anchor.to(basis))
        if weight is not None and edit is not edits[-1]:
            weight = edit_weight(weight, basis, edit.strength, edit.norm, edit.site.span)
    return _Live(tuple(ops), inputs, None if plain else bias, None if plain else new_bias)


def _whole(edit: Edit, basis: Tensor, weight: Tensor | None) -> tuple[Op, Tensor | None]:
    """An edit of all columns, and what it scales the inputs by."""
    factors = Scales() if weight is None else scales(measure(weight, basis), basis, edit.strength, edit.norm)
    # An embedding's output is one column of W, so the rule `columns` keeps the output's own length. Its
    # inputs say nothing: OPT's positions take an attention mask, not row numbers.
    keeps = edit.site.layout == "embedding" and edit.norm == "columns"

    def op(y: Tensor, args: tuple[Any, ...]) -> Tensor:
        moved = torch.addmm(y, y @ basis.T, basis, alpha=-edit.strength)
        y = restretched(y, moved) if keeps else moved
        return y if factors.outputs is None else y * factors.outputs

    return op, None if edit.site.layout == "embedding" else factors.inputs


def _columns(edit: Edit, span: tuple[int, int], basis: Tensor, weight: Tensor, inputs: Tensor | None) -> Op:
    """An edit of one head: y ← y − s(x Vᵀ)Q with V = Q W of its columns; under a norm rule y ← y + x(W′ − W)ᵀ.

    The input arrives with all factors of whole edits in it; ``weight`` holds those of the edits before this one, so
    these ``inputs`` are divided out.
    """
    columns = slice(*span)
    part = weight[:, columns]
    if edit.norm == "none":
        down, up = basis @ part, -edit.strength * basis
    else:
        down, up = edit_weight(part, basis, edit.strength, edit.norm) - part, None
    down = down if inputs is None else down / inputs[columns]

    def op(y: Tensor, args: tuple[Any, ...]) -> Tensor:
        taken = args[0][..., columns].float().reshape(len(y), -1)
        written: Tensor = taken @ down.T
        return y + (written if up is None else written @ up)

    return op


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _times(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a * b


def _attach(module: nn.Module, live: _Live) -> list[RemovableHandle]:
    handles = [module.register_forward_hook(_output_hook(live))]
    if live.inputs is not None:
        handles.append(module.register_forward_pre_hook(_input_hook(live.inputs)))
    return handles


def _input_hook(factor: Tensor) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0] * factor.to(args[0].dtype), *args[1:])

    return hook


def _output_hook(live: _Live) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return _edited(output.float(), args, live).to(output.dtype)

    return hook


def _edited(y: Tensor, args: tuple[Any, ...], live: _Live) -> Tensor:
    flat = y.reshape(-1, y.shape[-1])
    if live.before is not None:
        flat = flat - live.before
    for op in live.ops:
        flat = op(flat, args)
    return (flat if live.after is None else flat + live.after).view(y.shape)
