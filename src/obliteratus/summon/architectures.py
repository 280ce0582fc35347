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

from obliteratus.core.types import Layout, NormKind


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
    heads: bool = True
    """Whether the inputs of ``attn.out`` are those of ``num_attention_heads`` heads."""
    inner: tuple[str, ...] = ()
    """Parameters with two axes or more that neither read the stream nor write into it, but stand between others."""


@dataclass(frozen=True)
class Architecture:
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
    hands_on: bool = False
    """Whether blocks hand later ones more than the stream, such as keys and values: none of them is then left out of a
    pass because what it gave is known."""
    recurrent: bool = False
    """Whether convolutions, delta nets or state spaces keep states between tokens: a shared prefix is then not reused,
    and only prompts of equal length are answered together."""


def _gpt2_refusal(config: PreTrainedConfig) -> str:
    return "cross-attention writes into the stream too" if config.add_cross_attention else ""


def _opt_refusal(config: PreTrainedConfig) -> str:
    if not config.do_layer_norm_before:
        return "do_layer_norm_before=False normalises the stream itself (OPT-350m)"
    if config.word_embed_proj_dim != config.hidden_size:
        return "word_embed_proj_dim differs from hidden_size, so a projection stands before the stream"
    return "checkpoints without a final norm are not declared" if config._remove_final_layer_norm else ""


LLAMA = Architecture(
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
GPT2 = Architecture(
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
GPT_NEOX = Architecture(  # parallel residual or not: both read and write the same stream, through the same norms
    layers="gpt_neox.layers",
    embeds=("gpt_neox.embed_in",),
    unembed="lm_head",
    final_norm="gpt_neox.final_layer_norm",
    writers={"attn.out": ("attention.dense", "linear"), "mlp.out": ("mlp.dense_4h_to_h", "linear")},
    readers={"attn.in": ("attention.query_key_value",), "mlp.in": ("mlp.dense_h_to_4h",)},
    pre_norm={"attn.in": "input_layernorm", "mlp.in": "post_attention_layernorm"},
    norm="layer",
)
OPT = Architecture(
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
        "latent attention",
        at="self_attn.q_proj",
        readers={"attn.in": ("self_attn.q_proj", _MLA_IN)},
        pre_norm=_MLA_NORM,
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


# ------------------------------------------------------------------------------------------------ hybrids
_IN = {"attn.in": "input_layernorm"}
_QKV = LLAMA.readers["attn.in"]
SELF_ATTENTION = Branch(
    "attention",
    at="self_attn.q_proj",
    writers={"attn.out": LLAMA.writers["attn.out"]},
    readers={"attn.in": _QKV},
    pre_norm=_IN,
)


def _delta_net(*reads: str) -> Branch:
    return Branch(
        "gated delta net",
        at="linear_attn.out_proj",
        writers={"attn.out": ("linear_attn.out_proj", "linear")},
        readers={"attn.in": tuple(f"linear_attn.in_proj_{name}" for name in reads)},
        pre_norm=_IN,
        heads=False,
        inner=("linear_attn.conv1d.weight",),
    )


MAMBA = Branch(
    "Mamba 2",
    at="mamba.out_proj",
    writers={"attn.out": ("mamba.out_proj", "linear")},
    readers={"attn.in": ("mamba.in_proj",)},
    pre_norm=_IN,
    heads=False,
    inner=("mamba.conv1d.weight",),
)
MAMBA_1 = replace(
    MAMBA,
    name="Mamba",
    inner=(*MAMBA.inner, "mamba.x_proj.weight", "mamba.dt_proj.weight", "mamba.A_log"),
)
HYBRID = replace(ATTENTION, writers={}, readers={}, pre_norm={}, bias_switch={}, recurrent=True)
QWEN3_NEXT = replace(HYBRID, norm="rms+1", branches=((_delta_net("qkvz", "ba"), SELF_ATTENTION), (DENSE, QWEN_MOE)))
QWEN3_5 = replace(QWEN3_NEXT, branches=((_delta_net("qkv", "z", "b", "a"), SELF_ATTENTION), (DENSE, QWEN_MOE)))
_SHARED_MLP = Branch(
    "MLP",
    at="shared_mlp",
    writers={"mlp.out": ("shared_mlp.output_linear", "linear")},
    readers={"mlp.in": ("shared_mlp.input_linear",)},
    pre_norm=_MLP_NORM,
)
GRANITE_HYBRID = replace(
    HYBRID,
    branches=(
        (MAMBA, SELF_ATTENTION),
        (
            replace(
                GRANITE_EXPERTS,
                name="routed and shared experts",
                writers={**GRANITE_EXPERTS.writers, "shared.out": ("shared_mlp.output_linear", "linear")},
                readers={**GRANITE_EXPERTS.readers, "mlp.in": (_GRANITE_GATE_UP, "shared_mlp.input_linear")},
            ),
            _SHARED_MLP,
        ),
    ),
)
_FFN_NORM = {"mlp.in": "ffn_norm", "router": "ffn_norm"}
_FFN_STACK = Matrix("feed_forward.experts", "stack", "down_proj")
_FFN_GATE_UP = Matrix("feed_forward.experts", "stack", "gate_up_proj")
LFM2 = replace(
    HYBRID,
    final_norm="model.embedding_norm",
    branches=(
        (
            Branch(
                "short convolution",
                at="conv.out_proj",
                writers={"attn.out": ("conv.out_proj", "linear")},
                readers={"attn.in": ("conv.in_proj",)},
                pre_norm={"attn.in": "operator_norm"},
                heads=False,
                inner=("conv.conv.weight",),
            ),
            replace(
                SELF_ATTENTION,
                writers={"attn.out": ("self_attn.out_proj", "linear")},
                pre_norm={"attn.in": "operator_norm"},
            ),
        ),
        (
            Branch(
                "MLP",
                at="feed_forward.w2",
                writers={"mlp.out": ("feed_forward.w2", "linear")},
                readers={"mlp.in": ("feed_forward.w1", "feed_forward.w3")},
                pre_norm=_FFN_NORM,
            ),
            Branch(
                "experts",
                at="feed_forward.experts",
                writers={"expert.out": _FFN_STACK},
                readers={"mlp.in": (_FFN_GATE_UP,), "router": ("feed_forward.gate",)},
                pre_norm=_FFN_NORM,
            ),
        ),
    ),
)
_PRE_FF = {"mlp.in": "pre_ff_layernorm", "router": "pre_ff_layernorm"}
_FF_DENSE = Branch(
    "MLP",
    at="feed_forward.down_proj",
    writers={"mlp.out": ("feed_forward.down_proj", "linear")},
    readers={"mlp.in": ("feed_forward.gate_proj", "feed_forward.up_proj")},
    pre_norm=_PRE_FF,
)
JAMBA = replace(
    HYBRID,
    final_norm="model.final_layernorm",
    branches=(
        (MAMBA_1, SELF_ATTENTION),
        (
            _FF_DENSE,
            Branch(
                "experts",
                at="feed_forward.experts",
                writers={"expert.out": _FFN_STACK},
                readers={"mlp.in": (_FFN_GATE_UP,), "router": ("feed_forward.router",)},
                pre_norm=_PRE_FF,
            ),
        ),
    ),
)
FALCON_H1 = replace(  # a state space and attention side by side in every block
    HYBRID,
    final_norm="model.final_layernorm",
    branches=((MAMBA,), (SELF_ATTENTION,), (_FF_DENSE,)),
    bias_switch={"mlp": "mlp_bias"},
)
_MIXER_SHARED = {"shared.out": Matrix("mixer.shared_experts.down_proj")}
_MIXER_NORM = {"attn.in": "norm", "mlp.in": "norm", "router": "norm"}
NEMOTRON_H = replace(  # each block is one mixer, one MLP or experts
    HYBRID,
    embeds=("model.embeddings",),
    final_norm="model.norm_f",
    branches=(
        (
            Branch(
                "Mamba 2",
                at="mixer.out_proj",
                writers={"attn.out": ("mixer.out_proj", "linear")},
                readers={"attn.in": ("mixer.in_proj",)},
                pre_norm=_MIXER_NORM,
                heads=False,
                inner=("mixer.conv1d.weight",),
            ),
            Branch(
                "attention",
                at="mixer.o_proj",
                writers={"attn.out": ("mixer.o_proj", "linear")},
                readers={"attn.in": ("mixer.q_proj", "mixer.k_proj", "mixer.v_proj")},
                pre_norm=_MIXER_NORM,
            ),
            Branch(
                "MLP",
                at="mixer.down_proj",
                writers={"mlp.out": ("mixer.down_proj", "linear")},
                readers={"mlp.in": ("mixer.up_proj",)},
                pre_norm=_MIXER_NORM,
            ),
            Branch(  # routed experts work in a narrower space: what leaves it writes for them all
                "latent and shared experts",
                at="mixer.fc2_latent_proj.weight",
                writers={"expert.out": ("mixer.fc2_latent_proj", "linear"), **_MIXER_SHARED},
                readers={
                    "mlp.in": ("mixer.fc1_latent_proj", "mixer.shared_experts.up_proj"),
                    "router": ("mixer.gate",),
                },
                pre_norm=_MIXER_NORM,
                inner=("mixer.experts.up_proj", "mixer.experts.down_proj"),
            ),
            Branch(
                "routed and shared experts",
                at="mixer.experts",
                writers={"expert.out": Matrix("mixer.experts", "stack", "down_proj"), **_MIXER_SHARED},
                readers={
                    "mlp.in": (Matrix("mixer.experts", "stack", "up_proj"), "mixer.shared_experts.up_proj"),
                    "router": ("mixer.gate",),
                },
                pre_norm=_MIXER_NORM,
            ),
        ),
    ),
)


# ------------------------------------------------------------------------------------ Gemma 4, text and vision
def _gemma4_refusal(config: PreTrainedConfig) -> str:
    if config.enable_moe_block:
        return "enable_moe_block puts two norms one behind the other between the experts and the stream"
    return ""


def _gemma4_attention(*reads: str) -> Branch:
    at = reads[-1]
    return Branch(
        "attention", at=f"self_attn.{at}", readers={"attn.in": tuple(f"self_attn.{r}" for r in reads)}, pre_norm=_IN
    )


GEMMA4 = replace(
    GEMMA2,
    norm="rms",
    readers={"mlp.in": GEMMA2.readers["mlp.in"]},
    pre_norm={"mlp.in": "pre_feedforward_layernorm"},
    branches=(
        (  # keys may serve as values, and late layers may share those of an earlier one
            _gemma4_attention("q_proj", "k_proj", "v_proj"),
            _gemma4_attention("q_proj", "k_proj"),
            _gemma4_attention("q_proj"),
        ),
        (
            Branch(
                "per-layer embeddings",
                at="per_layer_projection",
                writers={"mlp.out": ("per_layer_projection", "linear")},
                readers={"mlp.in": ("per_layer_input_gate",)},
                post_norm={"mlp.out": "post_per_layer_input_norm"},
            ),
            Branch("", at=""),
        ),
    ),
    beside=("model.embed_tokens_per_layer.weight", "model.per_layer_model_projection.weight"),
    refusal=_gemma4_refusal,
    scales_stream=True,
    hands_on=True,
    bias_switch={},
)


def _in_vision(family: Architecture) -> Architecture:
    """The same text model inside one that sees. What images write enters with the embeddings, and is not edited."""

    def inside(path: str) -> str:
        return f"model.language_model.{path.removeprefix('model.')}"

    return replace(
        family,
        layers=inside(family.layers),
        final_norm=inside(family.final_norm),
        embeds=tuple(map(inside, family.embeds)),
        bias_switch={},
    )


FAMILIES: dict[str, Architecture] = {
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
    "qwen3_next": QWEN3_NEXT,
    "qwen3_5_text": replace(QWEN3_5, branches=(QWEN3_5.branches[0], (DENSE,))),
    "qwen3_5_moe_text": replace(QWEN3_5, branches=(QWEN3_5.branches[0], (QWEN_MOE,))),
    "granitemoehybrid": GRANITE_HYBRID,
    "lfm2": replace(LFM2, branches=(LFM2.branches[0], LFM2.branches[1][:1])),
    "lfm2_moe": LFM2,
    "jamba": JAMBA,
    "falcon_h1": FALCON_H1,
    "nemotron_h": NEMOTRON_H,
    "gemma4_text": GEMMA4,
    "gemma3": _in_vision(GEMMA2),
    "qwen2_vl": _in_vision(LLAMA),
    "qwen2_5_vl": _in_vision(LLAMA),
    "qwen3_vl": _in_vision(LLAMA),
}
"""By `config.model_type`."""

UNSUPPORTED: dict[str, str] = {
    "gemma3n": "its blocks mix four streams (AltUp), where an edit here is of one",
    "gemma3n_text": "its blocks mix four streams (AltUp), where an edit here is of one",
}
"""Architectures that were looked at and have no entry: why."""
