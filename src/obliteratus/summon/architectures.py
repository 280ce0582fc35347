"""The architecture table: the matrices of each model type that write into the residual stream or read from it.

Entries are declared from the architecture's code in the pinned transformers version, never guessed from a shape, and
`selftest.self_test` checks them on a loaded model. `python -m bench.docs` generates docs/architectures.md from them.

Scales between a writer and the stream need no entry, because a projection commutes with them: router scores, output
gates that multiply a whole token, multipliers of residuals and embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from transformers import PreTrainedConfig

from obliteratus.core.types import Layout, NormKind


class Matrix(NamedTuple):
    """A matrix of a block; a plain tuple of its first fields may stand for it."""

    path: str
    """The module that holds it, relative to its block."""
    layout: Layout = "linear"
    weight: str = "weight"
    """Name of the weight parameter in that module."""
    bias: str = "bias"
    """Name of the bias parameter, if the module has one."""


Writer = tuple[str, Layout] | Matrix


@dataclass(frozen=True)
class Branch:
    """Modules that only some blocks have, such as one kind of mixer, a dense MLP or experts. Paths are relative to the
    block."""

    name: str
    """The branch's name in docs/architectures.md."""
    marker: str
    """A module or parameter whose presence in a block means that the block has this branch; empty matches any block."""
    writers: Mapping[str, Writer] = field(default_factory=dict)
    readers: Mapping[str, Sequence[str | Matrix]] = field(default_factory=dict)
    pre_norm: Mapping[str, str] = field(default_factory=dict)
    post_norm: Mapping[str, str] = field(default_factory=dict)
    heads: bool = True
    """Whether the inputs of ``attn.out`` are those of ``num_attention_heads`` heads."""
    inner: tuple[str, ...] = ()
    """Parameters with two or more axes that stand between readers and writers and do not touch the stream."""


@dataclass(frozen=True)
class Architecture:
    """One architecture. Paths inside a decoder block are relative to it, all others to the model."""

    layers: str
    """The list of decoder blocks."""
    embeds: tuple[str, ...]
    """Every table whose rows are added to the stream: tokens, and learned positions where there are any."""
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
    """``attn`` or ``mlp`` → the configuration key that gives all linear layers of that half a bias. Anchored edits
    need a bias to bake; a half without a key cannot have one."""
    explain_refusal: Callable[[PreTrainedConfig], str] = lambda config: ""
    """Returns why a configuration is not covered, or '' if it is."""
    branches: tuple[tuple[Branch, ...], ...] = ()
    """The choices in which blocks differ, each with its alternatives: a block has the first whose marker it holds."""
    inner: tuple[str, ...] = ()
    """Like `Branch.inner`, for every block."""
    inner_outside_blocks: tuple[str, ...] = ()
    """Like `inner`, for parameters outside the blocks, by their path in the model."""
    routing_sums_to_one: bool = False
    """Whether a token's routing weights sum to one. Only then does a bias on every expert add up to one bias."""
    scales_stream: bool = False
    """Whether a block multiplies the whole stream by a number, which leaves directions as they are."""
    shares_state_across_layers: bool = False
    """Whether blocks hand later blocks more than the stream, such as keys and values. Then no block may be skipped in a
    pass because its output is known."""
    recurrent: bool = False
    """Whether convolutions, delta nets or state spaces keep states between tokens. Then no shared prefix is reused, and
    only prompts of equal length are answered in one batch."""


def _gpt2_refusal(config: PreTrainedConfig) -> str:
    return "cross-attention also writes into the stream" if config.add_cross_attention else ""


def _opt_refusal(config: PreTrainedConfig) -> str:
    if not config.do_layer_norm_before:
        return "do_layer_norm_before=False normalizes the stream itself (OPT-350m)"
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
    explain_refusal=_gpt2_refusal,
)
GPT_NEOX = Architecture(  # the same with and without parallel residual: both use the same stream and norms
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
    explain_refusal=_opt_refusal,
)

# ------------------------------------------------------------------------------------ mixtures of experts
STACK = Matrix("mlp.experts", "stack", "down_proj")
STACKED_GATE_UP = Matrix("mlp.experts", "stack", "gate_up_proj")
_MLP_NORM = {"mlp.in": "post_attention_layernorm", "router": "post_attention_layernorm"}
_DENSE_IN = ("mlp.gate_proj", "mlp.up_proj")
DENSE = Branch(
    "MLP",
    marker="mlp.down_proj",
    writers={"mlp.out": ("mlp.down_proj", "linear")},
    readers={"mlp.in": _DENSE_IN},
    pre_norm=_MLP_NORM,
)
EXPERTS = Branch(
    "experts",
    marker="mlp.experts",
    writers={"expert.out": STACK},
    readers={"mlp.in": (STACKED_GATE_UP,), "router": ("mlp.gate",)},
    pre_norm=_MLP_NORM,
)


def _with_shared(name: str, *gates: str) -> Branch:
    """Return the branch of routed experts and a shared expert of that module name, which all tokens pass."""
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
MLA = (  # queries and keys pass low-rank matrices with norms of their own
    Branch(
        "latent attention",
        marker="self_attn.q_a_proj",
        readers={"attn.in": ("self_attn.q_a_proj", _MLA_IN)},
        pre_norm=_MLA_NORM,
        inner=("self_attn.q_b_proj.weight",),
    ),
    Branch(
        "latent attention",
        marker="self_attn.q_proj",
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
    bias_switch={},  # attention_bias does not cover q_proj
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
    routing_sums_to_one=True,  # a softmax over the chosen experts
)
_GRANITE_GATE_UP = Matrix("block_sparse_moe.experts", "stack", "gate_up_proj")
GRANITE_EXPERTS = replace(
    EXPERTS,
    marker="block_sparse_moe.experts",
    writers={"expert.out": Matrix("block_sparse_moe.experts", "stack", "down_proj")},
    readers={"mlp.in": (_GRANITE_GATE_UP,), "router": ("block_sparse_moe.router",)},
)


# ------------------------------------------------------------------------------------------------ hybrids
_IN = {"attn.in": "input_layernorm"}
_QKV = LLAMA.readers["attn.in"]
SELF_ATTENTION = Branch(
    "attention",
    marker="self_attn.q_proj",
    writers={"attn.out": LLAMA.writers["attn.out"]},
    readers={"attn.in": _QKV},
    pre_norm=_IN,
)


def _delta_net(*reads: str) -> Branch:
    return Branch(
        "gated delta net",
        marker="linear_attn.out_proj",
        writers={"attn.out": ("linear_attn.out_proj", "linear")},
        readers={"attn.in": tuple(f"linear_attn.in_proj_{name}" for name in reads)},
        pre_norm=_IN,
        heads=False,
        inner=("linear_attn.conv1d.weight",),
    )


MAMBA = Branch(
    "Mamba 2",
    marker="mamba.out_proj",
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
    marker="shared_mlp",
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
                marker="conv.out_proj",
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
                marker="feed_forward.w2",
                writers={"mlp.out": ("feed_forward.w2", "linear")},
                readers={"mlp.in": ("feed_forward.w1", "feed_forward.w3")},
                pre_norm=_FFN_NORM,
            ),
            Branch(
                "experts",
                marker="feed_forward.experts",
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
    marker="feed_forward.down_proj",
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
                marker="feed_forward.experts",
                writers={"expert.out": _FFN_STACK},
                readers={"mlp.in": (_FFN_GATE_UP,), "router": ("feed_forward.router",)},
                pre_norm=_PRE_FF,
            ),
        ),
    ),
)
FALCON_H1 = replace(  # every block has a state space and attention side by side
    HYBRID,
    final_norm="model.final_layernorm",
    branches=((MAMBA,), (SELF_ATTENTION,), (_FF_DENSE,)),
    bias_switch={"mlp": "mlp_bias"},
)
_MIXER_SHARED = {"shared.out": Matrix("mixer.shared_experts.down_proj")}
_MIXER_NORM = {"attn.in": "norm", "mlp.in": "norm", "router": "norm"}
NEMOTRON_H = replace(  # each block is a mixer, an MLP or experts
    HYBRID,
    embeds=("model.embeddings",),
    final_norm="model.norm_f",
    branches=(
        (
            Branch(
                "Mamba 2",
                marker="mixer.out_proj",
                writers={"attn.out": ("mixer.out_proj", "linear")},
                readers={"attn.in": ("mixer.in_proj",)},
                pre_norm=_MIXER_NORM,
                heads=False,
                inner=("mixer.conv1d.weight",),
            ),
            Branch(
                "attention",
                marker="mixer.o_proj",
                writers={"attn.out": ("mixer.o_proj", "linear")},
                readers={"attn.in": ("mixer.q_proj", "mixer.k_proj", "mixer.v_proj")},
                pre_norm=_MIXER_NORM,
            ),
            Branch(
                "MLP",
                marker="mixer.down_proj",
                writers={"mlp.out": ("mixer.down_proj", "linear")},
                readers={"mlp.in": ("mixer.up_proj",)},
                pre_norm=_MIXER_NORM,
            ),
            Branch(  # routed experts share a narrower space, and one matrix writes for all of them
                "latent and shared experts",
                marker="mixer.fc2_latent_proj.weight",
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
                marker="mixer.experts",
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
        return "enable_moe_block puts two norms in a row between the experts and the stream"
    return ""


def _gemma4_attention(*reads: str) -> Branch:
    readers = {"attn.in": tuple(f"self_attn.{name}" for name in reads)}
    return Branch("attention", marker=f"self_attn.{reads[-1]}", readers=readers, pre_norm=_IN)


GEMMA4 = replace(
    GEMMA2,
    norm="rms",
    readers={"mlp.in": GEMMA2.readers["mlp.in"]},
    pre_norm={"mlp.in": "pre_feedforward_layernorm"},
    branches=(
        (  # keys may serve as values, and late layers may reuse those of an earlier layer
            _gemma4_attention("q_proj", "k_proj", "v_proj"),
            _gemma4_attention("q_proj", "k_proj"),
            _gemma4_attention("q_proj"),
        ),
        (
            Branch(
                "per-layer embeddings",
                marker="per_layer_projection",
                writers={"mlp.out": ("per_layer_projection", "linear")},
                readers={"mlp.in": ("per_layer_input_gate",)},
                post_norm={"mlp.out": "post_per_layer_input_norm"},
            ),
            Branch("", marker=""),
        ),
    ),
    inner_outside_blocks=("model.embed_tokens_per_layer.weight", "model.per_layer_model_projection.weight"),
    explain_refusal=_gemma4_refusal,
    scales_stream=True,
    shares_state_across_layers=True,
    bias_switch={},
)


def _in_vision(text: Architecture) -> Architecture:
    """Return a text model's entry for an image-text model. What images write enters with the embeddings and is not
    edited."""

    def inside(path: str) -> str:
        return f"model.language_model.{path.removeprefix('model.')}"

    return replace(
        text,
        layers=inside(text.layers),
        final_norm=inside(text.final_norm),
        embeds=tuple(map(inside, text.embeds)),
        bias_switch={},
    )


ARCHITECTURES: dict[str, Architecture] = {
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
"""Architectures by `config.model_type`."""

UNSUPPORTED: dict[str, str] = {
    "gemma3n": "its blocks mix four streams (AltUp), and an edit here changes one stream",
    "gemma3n_text": "its blocks mix four streams (AltUp), and an edit here changes one stream",
}
"""Architectures that were examined and are not supported, each with the reason."""
