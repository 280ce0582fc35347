"""A plan applied to a running model by hooks: exact, without a copy of any weight, and undone on leaving the block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from obliteratus.core.types import Plan, Site, Subject
from obliteratus.excise.live.compile import (
    LiveOps,
    NormReadings,
    compile_changes,
    edit_input,
    edit_output,
    needs_stored_weight,
    run_edited_experts,
)
from obliteratus.excise.plan import check_fits
from obliteratus.summon.experts import Forward, ReplacedForward, replace_forward

Removable = RemovableHandle | ReplacedForward
GetOps = Callable[[], LiveOps]
"""Returns a module's operations, which may be compiled only when it first runs."""
CompiledPlan = list[Callable[[], list[Removable]]]
"""For each edited matrix, what attaches its hooks."""


@contextmanager
def applied(subject: Subject, plan: Plan) -> Iterator[None]:
    """Inside, the model computes as if the plan were baked into it; afterwards it is unchanged, bit for bit.

    Raises UserError if the plan was made for another model or edits what this one does not have.

    >>> with ob.applied(subject, plan):
    ...     edited = ob.measure(subject, prompts, ["behavior"])
    >>> edited["refusal.target"]
    <Score: 0.0% (0.0–9.6%), n 36>
    """
    with attached(compile_plan(subject, plan)):
        yield


def compile_plan(subject: Subject, plan: Plan, readings: NormReadings | None = None) -> CompiledPlan:
    """Return the plan in a form that `attached` can apply again and again, at the cost of registering its hooks.

    The weights must stay as they are, since a norm rule has read them. readings: what it has read for the same plan at
    other strengths, and where to keep what it reads now. Raises UserError as `applied`.
    """
    if plan.edits:
        check_fits(subject, plan)
    compiled: CompiledPlan = []
    for changes in plan.by_site().values():
        site = changes[0].site
        module = subject.module(site.path)
        get_ops = partial(compile_changes, module, changes, readings)
        lazy = needs_stored_weight(subject, changes)
        attach = partial(_attach_lazily, get_ops=get_ops) if lazy else partial(_attach, live=get_ops())
        compiled.append(partial(attach, module, site))
    return compiled


@contextmanager
def attached(compiled: CompiledPlan) -> Iterator[None]:
    """Inside, the model runs under a compiled plan; afterwards it is unchanged, bit for bit."""
    handles: list[Removable] = []
    try:
        for attach in compiled:
            handles += attach()
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def without_edits() -> Iterator[None]:
    """Inside, hooks of `applied` do nothing: whatever plan is applied, the model computes as it was loaded."""
    token = _PAUSED.set(True)
    try:
        yield
    finally:
        _PAUSED.reset(token)


def are_edits_paused() -> bool:
    """Return whether `without_edits` holds."""
    return _PAUSED.get()


_PAUSED: ContextVar[bool] = ContextVar("paused", default=False)


def _attach(module: nn.Module, site: Site, live: LiveOps) -> list[Removable]:
    """Attach the hooks that these operations need."""
    if live.experts:
        return [replace_forward(module, _experts_forward(module, site, lambda: live))]
    handles: list[Removable] = []
    if live.output_ops or live.new_bias is not None:
        handles.append(module.register_forward_hook(_output_hook(lambda: live)))
    if live.input_scale is not None or live.input_ops:
        handles.append(module.register_forward_pre_hook(_input_hook(lambda: live)))
    return handles


def _attach_lazily(module: nn.Module, site: Site, get_ops: GetOps) -> list[Removable]:
    """Attach every hook that changes could need; the operations are compiled when the module first runs."""
    once = cache(get_ops)
    if site.stacked:
        return [replace_forward(module, _experts_forward(module, site, once))]
    return [
        module.register_forward_hook(_output_hook(once)),
        module.register_forward_pre_hook(_input_hook(once)),
    ]


def _experts_forward(module: nn.Module, site: Site, get_ops: GetOps) -> Forward:
    original: Forward = module.forward

    def forward(x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        if _PAUSED.get():
            return original(x, chosen, weights)
        return run_edited_experts(module, site, get_ops(), (x, chosen, weights))

    return forward


def _input_hook(get_ops: GetOps) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        return None if _PAUSED.get() else (edit_input(args[0], get_ops()), *args[1:])

    return hook


def _output_hook(get_ops: GetOps) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        return None if _PAUSED.get() else edit_output(output.float(), args, get_ops()).to(output.dtype)

    return hook
