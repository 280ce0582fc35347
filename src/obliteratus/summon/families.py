"""The architecture table: which matrices of a model write into the residual stream, and which read from it.

Declared from the code of each architecture in the transformers version that is pinned, never guessed from a shape;
`selftest.self_test` proves it on a loaded model. `python -m bench.docs` makes docs/architectures.md from it.

Scales between a writer and the stream need no entry, for a projection commutes with them: router scores, output gates
that multiply a whole token, multipliers of residuals and embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from transformers import PreTrainedConfig

from obliteratus.types import Layout, NormKind


class Matrix(NamedTuple):
    """A matrix of a block; a plain pair or triple will do."""

    path: str
    """The module that holds it, relative to its block."""
    layout: Layout = "linear"
    weight: str = "weight"
    """Its own name in that module."""
    bias: str = "bias"
    """Its bias's, if there is one."""


Writer = tuple[str, Layout] | Matrix


@dataclass(frozen=True)
class Branch:
    """Modules that only some blocks have: a kind of mixer, a dense MLP, experts. Paths are relative to the block."""

    name: str
    """What a table of architectures calls it."""
    at: str
    """A module or parameter of the block; where it is there, the branch is. Empty: always, for blocks with none."""
    writers: Mapping[str, Writer] = field(default_factory=dict)
    readers: Mapping[str, Sequence[str | Matrix]] = field(default_factory=dict)
    pre_norm: Mapping[str, str] = field(default_factory=dict)
    post_norm: Mapping[str, str] = field(default_factory=dict)
    inner: tuple[str, ...] = ()
    """Parameters with two axes or more that neither read the stream nor write into it, but stand between others."""


@dataclass(frozen=True)
class Family:
    """One architecture. Paths inside a decoder block are relative to it, all others to the model."""

    layers: str
    """The list of decoder blocks."""
    embeds: tuple[str, ...]
    """Every table whose rows are added into the stream: tokens, and positions where they are learned."""
    unembed: str
    final_norm: str
    writers: Mapping[str, Writer]
    """Part → path and layout of the matrix whose output is added to the stream, in every block."""
    readers: Mapping[str, Sequence[str | Matrix]]
    """Part → paths of the matrices that read the stream, in every block."""
    pre_norm: Mapping[str, str]
    """Reader part → the norm between the stream and it; a part that reads the bare stream is absent."""
    post_norm: Mapping[str, str] = field(default_factory=dict)
    """Writer part → the norm between it and the stream; a part that writes straight into it is absent."""
    norm: NormKind = "rms"
    reader_layout: Literal["linear", "conv1d"] = "linear"
    bias_switch: Mapping[str, str] = field(default_factory=dict)
    """``attn`` or ``mlp`` → the configuration's key that gives all linear layers of that half a bias. Anchored
    edits need one to bake; a half without a key cannot have it."""
    refusal: Callable[[PreTrainedConfig], str] = lambda config: ""
    """Why this configuration is not covered; empty where it is."""
    branches: tuple[tuple[Branch, ...], ...] = ()
    """For each choice that blocks differ in, its alternatives: of these a block has the first that is there."""
    inner: tuple[str, ...] = ()
    """As `Branch.inner`, in every block."""
    beside: tuple[str, ...] = ()
    """The same beside the blocks: parameters by their path in the model."""
    routing_sums_to_one: bool = False
    """Whether a token's routing weights do. Only then is a bias of all experts the bias of their sum."""
    scales_stream: bool = False
    """Whether a block multiplies the whole stream by a number, which leaves directions as they are."""
    windows: bool = True
    """Nothing but attention keeps states between tokens; False: convolutions, delta nets or state spaces do too."""


def _gpt2_refusal(config: PreTrainedConfig) -> str:
    return "cross-attention writes into the stream too" if config.add_cross_attention else ""


def _opt_refusal(config: PreTrainedConfig) -> str:
    if not config.do_layer_norm_before:
        return "do_layer_norm_before=False normalises the stream itself (OPT-350m)"
    if config.word_embed_proj_dim != config.hidden_size:
        return "word_embed_proj_dim differs from hidden_size, so a projection stands before the stream"
    return "checkpoints without a final norm are not declared" if config._remove_final_layer_norm else ""


LLAMA = Family(
    layers="model.layers",
    embeds=("model.embed_tokens",),
    unembed="lm_head",
    final_norm="model.norm",
    writers={"attn.out": ("self_attn.o_proj", "linear"), "mlp.out": ("mlp.down_proj", "linear")},
    readers={
        "attn.in": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "mlp.in": ("mlp.gate_proj", "mlp.up_proj"),
    },
    pre_norm={"attn.in": "input_layernorm", "mlp.in": "post_attention_layernorm"},
    bias_switch={"attn": "attention_bias", "mlp": "mlp_bias"},
)
_ATTENTION_ONLY = {"attn": "attention_bias"}
_POST_NORMS = {"attn.out": "post_attention_layernorm", "mlp.out": "post_feedforward_layernorm"}
GEMMA = replace(LLAMA, norm="rms+1", bias_switch=_ATTENTION_ONLY)
GEMMA2 = replace(
    GEMMA,
    pre_norm={"attn.in": "input_layernorm", "mlp.in": "pre_feedforward_layernorm"},
    post_norm=_POST_NORMS,
)
GPT2 = Family(
    layers="transformer.h",
    embeds=("transformer.wte", "transformer.wpe"),
    unembed="lm_head",
    final_norm="transformer.ln_f",
    writers={"attn.out": ("attn.c_proj", "conv1d"), "mlp.out": ("mlp.c_proj", "conv1d")},
    readers={"attn.in": ("attn.c_attn",), "mlp.in": ("mlp.c_fc",)},
    pre_norm={"attn.in": "ln_1", "mlp.in": "ln_2"},
    norm="layer",
    reader_layout="conv1d",
    refusal=_gpt2_refusal,
)
GPT_NEOX = Family(  # parallel residual or not: both read and write the same stream, through the same norms
    layers="gpt_neox.layers",
    embeds=("gpt_neox.embed_in",),
    unembed="lm_head",
    final_norm="gpt_neox.final_layer_norm",
    writers={"attn.out": ("attention.dense", "linear"), "mlp.out": ("mlp.dense_4h_to_h", "linear")},
    readers={"attn.in": ("attention.query_key_value",), "mlp.in": ("mlp.dense_h_to_4h",)},
    pre_norm={"attn.in": "input_layernorm", "mlp.in": "post_attention_layernorm"},
    norm="layer",
)
OPT = Family(
    layers="model.decoder.layers",
    embeds=("model.decoder.embed_tokens", "model.decoder.embed_positions"),
    unembed="lm_head",
    final_norm="model.decoder.final_layer_norm",
    writers={"attn.out": ("self_attn.out_proj", "linear"), "mlp.out": ("fc2", "linear")},
    readers={"attn.in": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "mlp.in": ("fc1",)},
    pre_norm={"attn.in": "self_attn_layer_norm", "mlp.in": "final_layer_norm"},
    norm="layer",
    refusal=_opt_refusal,
)

# ------------------------------------------------------------------------------------ mixtures of experts
STACK = Matrix("mlp.experts", "stack", "down_proj")
STACKED_GATE_UP = Matrix("mlp.experts", "stack", "gate_up_proj")
_MLP_NORM = {"mlp.in": "post_attention_layernorm", "router": "post_attention_layernorm"}
_DENSE_IN = ("mlp.gate_proj", "mlp.up_proj")
DENSE = Branch(
    "MLP",
    at="mlp.down_proj",
    writers={"mlp.out": ("mlp.down_proj", "linear")},
    readers={"mlp.in": _DENSE_IN},
    pre_norm=_MLP_NORM,
)
EXPERTS = Branch(
    "experts",
    at="mlp.experts",
    writers={"expert.out": STACK},
    readers={"mlp.in": (STACKED_GATE_UP,), "router": ("mlp.gate",)},
    pre_norm=_MLP_NORM,
)


def _with_shared(name: str, *gates: str) -> Branch:
    """Routed experts and one shared expert, under this name, that all tokens pass."""
    return replace(
        EXPERTS,
        name="routed and shared experts",
        writers={**EXPERTS.writers, "shared.out": (f"mlp.{name}.down_proj", "linear")},
        readers={
            "mlp.in": (STACKED_GATE_UP, f"mlp.{name}.gate_proj", f"mlp.{name}.up_proj"),
            "router": ("mlp.gate", *gates),
        },
    )


QWEN_MOE = _with_shared("shared_expert", "mlp.shared_expert_gate")
DEEPSEEK_MOE = _with_shared("shared_experts")
ATTENTION = replace(
    LLAMA,
    writers={"attn.out": LLAMA.writers["attn.out"]},
    readers={"attn.in": LLAMA.readers["attn.in"]},
    pre_norm={"attn.in": "input_layernorm"},
    bias_switch=_ATTENTION_ONLY,
)
_MLA_IN = "self_attn.kv_a_proj_with_mqa"
_MLA_NORM = {"attn.in": "input_layernorm"}
MLA = (  # queries and keys pass low ranks, behind norms of their own
    Branch(
        "latent attention",
        at="self_attn.q_a_proj",
        readers={"attn.in": ("self_attn.q_a_proj", _MLA_IN)},
        pre_norm=_MLA_NORM,
        inner=("self_attn.q_b_proj.weight",),
    ),
    Branch(
        "latent attention", at="self_attn.q_proj", readers={"attn.in": ("self_attn.q_proj", _MLA_IN)}, pre_norm=_MLA_NORM
    ),
)
DEEPSEEK = replace(
    ATTENTION,
    readers={},
    pre_norm={},
    branches=(MLA, (DENSE, DEEPSEEK_MOE)),
    inner=("self_attn.kv_b_proj.weight",),
    bias_switch={},  # attention_bias leaves q_proj out
)
GPT_OSS = replace(
    ATTENTION,
    branches=(
        (
            replace(
                EXPERTS,
                writers={"expert.out": Matrix("mlp.experts", "stack_t", "down_proj", "down_proj_bias")},
                readers={
                    "mlp.in": (Matrix("mlp.experts", "stack_t", "gate_up_proj", "gate_up_proj_bias"),),
                    "router": ("mlp.router",),
                },
            ),
        ),
    ),
    routing_sums_to_one=True,  # a softmax over the chosen ones
)
_GRANITE_GATE_UP = Matrix("block_sparse_moe.experts", "stack", "gate_up_proj")
GRANITE_EXPERTS = replace(
    EXPERTS,
    at="block_sparse_moe.experts",
    writers={"expert.out": Matrix("block_sparse_moe.experts", "stack", "down_proj")},
    readers={"mlp.in": (_GRANITE_GATE_UP,), "router": ("block_sparse_moe.router",)},
)

FAMILIES: dict[str, Family] = {
    "llama": LLAMA,  # SmolLM and SmolLM2 too
    "mistral": replace(LLAMA, bias_switch={}),
    "qwen2": replace(LLAMA, bias_switch={}),
    "qwen3": replace(LLAMA, bias_switch=_ATTENTION_ONLY),
    "smollm3": LLAMA,
    "phi3": replace(
        LLAMA,
        readers={"attn.in": ("self_attn.qkv_proj",), "mlp.in": ("mlp.gate_up_proj",)},
        bias_switch={},
    ),
    "olmo2": replace(LLAMA, pre_norm={}, post_norm=_POST_NORMS, bias_switch=_ATTENTION_ONLY),
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA2,
    "gpt2": GPT2,
    "gpt_neox": GPT_NEOX,
    "opt": OPT,
    "mixtral": replace(ATTENTION, branches=((EXPERTS,),), bias_switch={}),
    "qwen2_moe": replace(ATTENTION, branches=((DENSE, QWEN_MOE),), bias_switch={}),
    "qwen3_moe": replace(ATTENTION, branches=((DENSE, EXPERTS),)),
    "olmoe": replace(ATTENTION, branches=((EXPERTS,),)),
    "deepseek_v2": DEEPSEEK,
    "deepseek_v3": DEEPSEEK,
    "glm4_moe": replace(ATTENTION, branches=((DENSE, DEEPSEEK_MOE),), bias_switch={}),
    "gpt_oss": GPT_OSS,
    "granitemoe": replace(ATTENTION, branches=((GRANITE_EXPERTS,),)),
}
"""By `config.model_type`."""
