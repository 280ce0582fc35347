"""A tiny Llama to upcycle to a mixture of experts, and its logits."""

from __future__ import annotations

from typing import Any

import torch
from tests.support.tiny import MODELS
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

EXPERTS, RANK = 4, 2


def ids(seed: int = 0, rows: int = 3, tokens: int = 9) -> Tensor:
    return torch.randint(0, 256, (rows, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: Any, tokens: Tensor) -> Tensor:
    result: Tensor = model(input_ids=tokens).logits
    return result


def llama(**options: Any) -> Any:
    """The tiny Llama with other options, rope base and eps among them, which must not be lost."""
    config = AutoConfig.for_model(
        "llama",
        **MODELS["llama"][1] | options,
        rms_norm_eps=1e-2,
        rope_parameters={"rope_type": "default", "rope_theta": 50.0},
    )
    dense = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    torch.manual_seed(0)
    for parameter in dense.parameters():
        parameter.data = torch.randn(parameter.shape) * (32**-0.5 if parameter.ndim > 1 else 1)
    return dense.eval().requires_grad_(False)
