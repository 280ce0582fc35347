"""A plan as live hooks: exact, O(width) a token, no weight copied or dequantised, undone by leaving the block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from obliteratus.excise.linear import edit_bias, edit_weight, measure, restretched, scales
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


@dataclass(frozen=True)
class _Live:
    """y′ = ops(y − b) + b′, on inputs scaled by ``inputs``. All of them fp32 on the module's device."""

    ops: tuple[tuple[Tensor, float, Tensor | None, bool], ...]
    """(Q [k, out], s, output scales [out] or None, whether each output keeps its length), in order."""
    inputs: Tensor | None
    before: Tensor | None
    """b, taken off first; None where that makes no difference."""
    after: Tensor | None
    """b′, added last."""


def _compiled(module: nn.Module, edits: Sequence[Edit]) -> _Live:
    """The weight is read only where a norm rule needs its lengths, one matrix at a time."""
    site, bias = edits[0].site, read_bias(module, edits[0].site)
    plain = all(e.norm == "none" and e.anchor is None for e in edits)
    weight = None if all(e.norm == "none" for e in edits) else read_weight(module, site)
    ops, inputs, new_bias = [], None, bias
    for edit in edits:
        basis = edit.basis.to(_device(module), torch.float32)
        outputs = None
        if weight is not None:
            factors = scales(measure(weight, basis), basis, edit.strength, edit.norm)
            weight = edit_weight(weight, basis, edit.strength, edit.norm) if edit is not edits[-1] else weight
            outputs = factors.outputs
            inputs = inputs if site.layout == "embedding" else _times(inputs, factors.inputs)
        anchor = None if edit.anchor is None else edit.anchor.to(basis)
        new_bias = edit_bias(new_bias, basis, edit.strength, anchor)
        # An embedding's output is one column of W, so the rule `columns` keeps the output's own length. Its
        # inputs say nothing: OPT's positions take an attention mask, not row numbers.
        keeps = site.layout == "embedding" and edit.norm == "columns"
        ops.append((basis, edit.strength, outputs, keeps))
    return _Live(tuple(ops), inputs, None if plain else bias, None if plain else new_bias)


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
        return _edited(output.float(), live).to(output.dtype)

    return hook


def _edited(y: Tensor, live: _Live) -> Tensor:
    if live.before is not None:
        y = y - live.before
    for basis, strength, outputs, keeps in live.ops:
        flat = y.reshape(-1, y.shape[-1])
        moved = torch.addmm(flat, flat @ basis.T, basis, alpha=-strength)
        y = (restretched(flat, moved) if keeps else moved).view(y.shape)
        if outputs is not None:
            y = y * outputs
    return y if live.after is None else y + live.after
