"""Stacks of experts run by our own loop, where each expert's output must be changed before routing weighs it.

The loop is that of every experts class in transformers; how a class gates, and which way its matrices lie, the class
itself is marked with, for transformers' own kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from obliteratus.core.errors import UnsupportedModelError
from obliteratus.core.types import Site
from obliteratus.weights.devices import gathered_parameters

Forward = Callable[..., Tensor]
"""(stream [tokens, width], chosen experts [tokens, k], routing weights [tokens, k]) → [tokens, width]."""


@dataclass(frozen=True)
class ReplacedForward:
    """A module with another forward; `remove` brings back its own."""

    module: nn.Module
    before: Any

    def remove(self) -> None:
        if self.before is None:
            del vars(self.module)["forward"]
        else:
            vars(self.module)["forward"] = self.before


def is_stack(module: nn.Module) -> bool:
    """Whether transformers has marked it as experts in one tensor."""
    return "has_gate" in vars(module)


def replace_forward(module: nn.Module, forward: Forward) -> ReplacedForward:
    """The module's hooks still run. No weight is copied."""
    handle = ReplacedForward(module, vars(module).get("forward"))
    vars(module)["forward"] = forward
    return handle


def run_experts(
    module: nn.Module,
    site: Site,
    given: tuple[Tensor, Tensor, Tensor],
    feed: Callable[[int, Tensor], Tensor],
    change: Callable[[int, Tensor, Tensor], Tensor],
) -> Tensor:
    """What the experts put out, [tokens, width].

    given: as a `Forward` is given. feed: (expert, its hidden values) → what its writing matrix is given instead;
    change: (expert, what that matrix was given, its output) → another output. UnsupportedModelError where experts end
    in something else than that matrix.
    """
    x, chosen, weights = given
    kind: Any = module
    if kind.has_post_expert_norm:
        raise UnsupportedModelError(f"{site.path}: a norm stands behind each expert; use norm none")
    result = torch.zeros_like(x)
    with align_module_device(module), gathered_parameters(module):  # brings the stack in from disk or other processes
        for expert in chosen.unique().tolist():
            token, slot = torch.where(chosen == expert)
            h = feed(expert, _hidden(kind, x[token], expert))
            y = change(expert, h, _linear(kind, h, expert, site.weight))
            result.index_add_(0, token, (y * weights[token, slot, None]).to(result.dtype))
    return result


def _hidden(kind: Any, x: Tensor, expert: int) -> Tensor:
    """The hidden values of one expert."""
    made = _linear(kind, x, expert, "gate_up_proj" if kind.has_gate else "up_proj")
    hidden: Tensor = kind._apply_gate(made) if kind.has_gate else kind.act_fn(made)
    return hidden


def _linear(kind: Any, x: Tensor, expert: int, name: str) -> Tensor:
    weight = kind.get_parameter(name)[expert]
    y = x @ (weight if kind.is_transposed else weight.T)
    biased: Tensor = y + kind.get_parameter(f"{name}_bias")[expert] if kind.has_bias else y
    return biased
