"""Matrix products by oneDNN, where torch's own linear layers would take MKL's.

On AMD's processors MKL falls short of them: with 512 tokens and SmolLM2's matrices 162 to 190 GFLOP/s on two cores,
where oneDNN does 198 to 213 on the same weights as they lie (EXPERIMENTS.md, "Whose matrix products").
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from obliteratus.shapes import Float
from obliteratus.summon.capture import blocks
from obliteratus.types import Subject

# Rows below which the product is bound by reading the weight, which nobody does faster.
ROWS = 64
THERE = bool(torch.backends.mkldnn.is_available())


def product(
    x: Float[Tensor, "*rows inp"], weight: Float[Tensor, "out inp"], bias: Float[Tensor, " out"] | None
) -> Float[Tensor, "*rows out"]:
    """x Wᵀ + b, without gradients: `torch.nn.functional.linear`, the sums in another order."""
    if not THERE or x.dtype != torch.float32 or weight.device.type != "cpu" or x.shape[:-1].numel() < ROWS:
        return linear(x, weight, bias)
    made: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return made


@contextmanager
def quick_products(subject: Subject) -> Iterator[None]:
    """Inside, the blocks' linear layers go by `product`; hooks on them run as ever. No gradients pass."""
    mine = [m for block in blocks(subject) for m in block.modules() if _plain(m)]
    for module in mine:
        vars(module)["forward"] = partial(_forward, module)
    try:
        yield
    finally:
        for module in mine:
            del vars(module)["forward"]


def _plain(module: nn.Module) -> bool:
    """Whether it is torch's own, and nobody, such as offloading, has given it another forward."""
    return type(module) is nn.Linear and "forward" not in vars(module) and module.weight.dtype == torch.float32


def _forward(module: Any, x: Tensor) -> Tensor:
    return product(x, module.weight, module.bias)
