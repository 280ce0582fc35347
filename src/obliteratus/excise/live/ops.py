"""What live changes do to the tensors of a pass, whoever hooks them in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from obliteratus.core.types import Site
from obliteratus.summon.experts import run_experts

Op = Callable[[Tensor, tuple[Any, ...]], Tensor]
"""(values so far [tokens, width], the module's arguments) → values; fp32. Only edits of one head look at arguments."""


@dataclass(frozen=True)
class LiveOps:
    """y′ = ops(y − b) + b′, on inputs that ``feeds`` changed and ``inputs`` scaled. All fp32 on the module's device."""

    ops: tuple[Op, ...]
    feeds: tuple[Op, ...]
    inputs: Tensor | None
    before: Tensor | None
    """b, taken off first; None where that makes no difference."""
    after: Tensor | None
    """b′, added last."""
    experts: tuple[LiveOps | None, ...] = ()
    """Of a stack whose experts are not all changed alike: what each of them gets, in place of all else."""


def edit_input(x: Tensor, live: LiveOps) -> Tensor:
    """What the module is given in place of x, whose last axis is its width."""
    if live.inputs is not None:
        x = x * live.inputs.to(x.dtype)
    if not live.feeds:
        return x
    flat = x.float().reshape(-1, x.shape[-1])
    for op in live.feeds:
        flat = op(flat, (x,))
    return flat.view(x.shape).to(x.dtype)


def edit_output(y: Tensor, args: tuple[Any, ...], live: LiveOps) -> Tensor:
    """An output y, fp32, after the module's changes; args are what the module was given."""
    flat = y.reshape(-1, y.shape[-1])
    if live.before is not None:
        flat = flat - live.before
    for op in live.ops:
        flat = op(flat, args)
    return (flat if live.after is None else flat + live.after).view(y.shape)


def run_edited_experts(module: nn.Module, site: Site, live: LiveOps, given: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """What the experts make of what they are given, each under its own changes."""

    def feed(expert: int, h: Tensor) -> Tensor:
        mine = live.experts[expert]
        return h if mine is None else edit_input(h, mine)

    def change(expert: int, h: Tensor, y: Tensor) -> Tensor:
        mine = live.experts[expert]
        return y if mine is None else edit_output(y.float(), (h,), mine).to(y.dtype)

    return run_experts(module, site, given, feed, change)
