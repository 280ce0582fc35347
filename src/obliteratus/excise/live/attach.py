"""Live changes hooked onto a module, at once or, where its weight is on disk, when it first runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from obliteratus.core.types import Site
from obliteratus.excise.live.ops import LiveOps, edit_input, edit_output, run_edited_experts
from obliteratus.summon.experts import Forward, ReplacedForward, replace_forward

Removable = RemovableHandle | ReplacedForward
Late = Callable[[], LiveOps]


@contextmanager
def without_edits() -> Iterator[None]:
    """Inside, live edits stand still: whatever is `applied` around it, a model computes as it was opened."""
    token = _STILL.set(True)
    try:
        yield
    finally:
        _STILL.reset(token)


_STILL: ContextVar[bool] = ContextVar("still", default=False)


def attach(module: nn.Module, site: Site, live: LiveOps) -> list[Removable]:
    """The hooks that these changes need."""
    if live.experts:
        return [replace_forward(module, _experts_forward(module, site, lambda: live))]
    handles: list[Removable] = (
        [module.register_forward_hook(_output_hook(lambda: live))] if live.ops or live.after is not None else []
    )
    if live.inputs is not None or live.feeds:
        handles.append(module.register_forward_pre_hook(_input_hook(lambda: live)))
    return handles


def attach_lazily(module: nn.Module, site: Site, live: Late) -> list[Removable]:
    """All hooks that changes could need; they are made ready when the module first runs."""
    once = cache(live)
    if site.stacked:
        return [replace_forward(module, _experts_forward(module, site, once))]
    return [
        module.register_forward_hook(_output_hook(once)),
        module.register_forward_pre_hook(_input_hook(once)),
    ]


def _experts_forward(module: nn.Module, site: Site, live: Late) -> Forward:
    own = module.forward

    def forward(x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        return (
            own(x, chosen, weights) if _STILL.get() else run_edited_experts(module, site, live(), (x, chosen, weights))
        )

    return forward


def _input_hook(live: Late) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        return None if _STILL.get() else (edit_input(args[0], live()), *args[1:])

    return hook


def _output_hook(live: Late) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        return None if _STILL.get() else edit_output(output.float(), args, live()).to(output.dtype)

    return hook
