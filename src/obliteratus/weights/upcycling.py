"""Upcycles a dense Llama model to a mixture of experts (arXiv:2212.05055).

The result is a Mixtral model whose experts begin as copies of the MLP, differ by low-rank additions to their down
projections, and are chosen by a router.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, MixtralConfig

from obliteratus.core.errors import UserError
from obliteratus.core.shapes import Float

TOP_K = 2  # experts per token, as in Mixtral
EXPERTS_FILE = "experts.safetensors"
SHARED_CONFIG_KEYS = (  # configuration keys with the same meaning in Llama and Mixtral
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "rope_parameters",
    "attention_dropout",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


@dataclass(frozen=True)
class Experts:
    """The parameters that turn copies of an MLP into experts, for every layer, fp32."""

    router: Float[Tensor, "layer expert width"]
    """A token's scores are router[layer] @ (the MLP's input)."""
    a: Float[Tensor, "layer expert rank inner"]
    b: Float[Tensor, "layer expert width rank"]
    """b @ a is added to the expert's down projection."""


def read_experts(folder: Path) -> Experts:
    """Read the experts from `EXPERTS_FILE` in `folder`. Raises UserError if it is missing or holds other tensors."""
    file = folder / EXPERTS_FILE
    if not file.is_file():
        raise UserError(f"{file} is missing; restore it, or remake it with `python organisms/upcycle.py NAME`")
    stored = {name: tensor.float() for name, tensor in load_file(file).items()}
    if set(stored) != {"router", "a", "b"}:
        raise UserError(f"{file} holds {', '.join(sorted(stored))} instead of router, a and b")
    return Experts(**stored)


def make_mixture(dense: Any, experts: Experts) -> Any:
    """Return `dense` as a Mixtral model with these experts. Raises UserError as `upcycle`, and for other shapes."""
    model = upcycle(dense, experts.router)
    differentiate_experts(model, experts.a, experts.b)
    return model


def upcycle(dense: Any, router: Float[Tensor, "layer expert width"]) -> Any:
    """Return `dense` as a Mixtral model of its dtype, in eval mode, in which every expert is a copy of the layer's MLP.

    It computes what `dense` does, whatever the router, because the weights of a token's experts sum to one. Raises
    UserError for another architecture than Llama, for biases, and for a router of another depth or width.
    """
    config = make_moe_config(dense.config, router.shape[1])
    expected = (config.num_hidden_layers, router.shape[1], config.hidden_size)
    if tuple(router.shape) != expected:
        raise UserError(f"the router is {tuple(router.shape)}; this model needs {expected}")
    model: Any = AutoModelForCausalLM.from_config(config, dtype=dense.dtype)
    model.load_state_dict(make_moe_state(dense, router))
    model.generation_config = copy.deepcopy(dense.generation_config)
    return model.eval()


def make_moe_config(config: Any, experts: int) -> MixtralConfig:
    """Return a Llama configuration as a Mixtral one with that many experts, of which TOP_K are chosen."""
    if config.model_type != "llama":
        raise UserError(f"only Llama models can be upcycled, and this is {config.model_type!r}")
    if config.attention_bias or config.mlp_bias:
        raise UserError("this Llama model has biases, for which Mixtral has no place")
    if experts < TOP_K:
        raise UserError(f"{TOP_K} experts per token cannot be chosen from {experts}")
    values = config.to_dict()
    return MixtralConfig(
        **{name: values[name] for name in SHARED_CONFIG_KEYS},
        num_local_experts=experts,
        num_experts_per_tok=TOP_K,
        sliding_window=None,
    )


def make_moe_state(dense: Any, router: Float[Tensor, "layer expert width"]) -> dict[str, Tensor]:
    """Return the state dict of the Mixtral model: that of `dense`, with each MLP repeated for every expert (views)."""
    state = dict(dense.state_dict())
    for layer, scores in enumerate(router):
        mlp = f"model.layers.{layer}.mlp."
        gate, up, down = (state.pop(f"{mlp}{name}_proj.weight") for name in ("gate", "up", "down"))
        state[f"{mlp}gate.weight"] = scores
        state[f"{mlp}experts.gate_up_proj"] = torch.cat([gate, up]).expand(len(scores), -1, -1)
        state[f"{mlp}experts.down_proj"] = down.expand(len(scores), -1, -1)
    return state


@torch.no_grad()
def differentiate_experts(
    model: Any, a: Float[Tensor, "layer expert rank inner"], b: Float[Tensor, "layer expert width rank"]
) -> None:
    """Add b @ a to each expert's down projection, in place. Raises UserError if they do not fit the model."""
    downs = [layer.mlp.experts.down_proj for layer in model.model.layers]
    expected, product = (len(downs), *downs[0].shape), (*b.shape[:3], a.shape[-1])
    if product != expected:
        raise UserError(f"the product of the factors is {tuple(product)}; this model has {expected}")
    for down, left, right in zip(downs, b, a, strict=True):
        down += (left @ right).to(down.dtype)
