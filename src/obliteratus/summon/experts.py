"""Runs a stack of experts in our own loop, so that each expert's output can be changed before routing weighs it.

The loop is the one that every experts class in transformers has. Each class carries marks for transformers' own kernels
that say how it gates and which way its matrices lie.
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
    """A handle on a module whose forward was replaced."""

    module: nn.Module
    before: Any

    def remove(self) -> None:
        """Restore the module's own forward."""
        if self.before is None:
            del vars(self.module)["forward"]
        else:
            vars(self.module)["forward"] = self.before


def is_expert_stack(module: nn.Module) -> bool:
    """Return whether transformers marks the module as experts in one tensor."""
    return "has_gate" in vars(module)


def replace_forward(module: nn.Module, forward: Forward) -> ReplacedForward:
    """Replace the module's forward; its hooks still run, and no weight is copied."""
    handle = ReplacedForward(module, vars(module).get("forward"))
    vars(module)["forward"] = forward
    return handle


def run_experts(
    module: nn.Module,
    site: Site,
    inputs: tuple[Tensor, Tensor, Tensor],
    change_input: Callable[[int, Tensor], Tensor],
    change_output: Callable[[int, Tensor, Tensor], Tensor],
) -> Tensor:
    """Return what the experts put out, [tokens, width].

    inputs: the three arguments of a `Forward`. change_input: (expert, its hidden values) → what its writing matrix gets
    instead. change_output: (expert, what that matrix got, its output) → what it puts out instead.
    Raises UnsupportedModelError if a norm follows that matrix.
    """
    x, chosen, weights = inputs
    experts: Any = module
    if experts.has_post_expert_norm:
        raise UnsupportedModelError(f"{site.path}: a norm follows each expert's output matrix; use norm none")
    result = torch.zeros_like(x)
    with align_module_device(module), gathered_parameters(module):  # loads the stack from disk or other processes
        for expert in chosen.unique().tolist():
            token, slot = torch.where(chosen == expert)
            h = change_input(expert, _hidden_values(experts, x[token], expert))
            y = change_output(expert, h, _apply_linear(experts, h, expert, site.weight))
            result.index_add_(0, token, (y * weights[token, slot, None]).to(result.dtype))
    return result


def _hidden_values(experts: Any, x: Tensor, expert: int) -> Tensor:
    inner = _apply_linear(experts, x, expert, "gate_up_proj" if experts.has_gate else "up_proj")
    hidden: Tensor = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
    return hidden


def _apply_linear(experts: Any, x: Tensor, expert: int, name: str) -> Tensor:
    weight = experts.get_parameter(name)[expert]
    y = x @ (weight if experts.is_transposed else weight.T)
    biased: Tensor = y + experts.get_parameter(f"{name}_bias")[expert] if experts.has_bias else y
    return biased
