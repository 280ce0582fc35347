"""Which matrices of an architecture write into the residual stream, and which read from it.

`FAMILIES` is declared, never guessed from a shape; `selftest.self_test` proves it on a loaded model.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from math import prod
from typing import Any, Literal

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from obliteratus.errors import UnsupportedModelError
from obliteratus.shapes import Float
from obliteratus.summon.quantised import dims, is_packed
from obliteratus.types import Layout, NormKind, Site, Subject


# ----------------------------------------------------------------------------------------- the table
def _nothing(config: PreTrainedConfig) -> str:
    return ""


@dataclass(frozen=True)
class Family:
    """One architecture. Paths inside a decoder block are relative to it, all others to the model."""

    layers: str
    """The list of decoder blocks."""
    embeds: tuple[str, ...]
    """Every table whose rows are added into the stream: tokens, and positions where they are learned."""
    unembed: str
    final_norm: str
    writers: Mapping[str, tuple[str, Layout]]
    """Part → path and layout of the matrix whose output is added to the stream."""
    readers: Mapping[str, tuple[str, ...]]
    """Part → paths of the matrices that read the stream."""
    pre_norm: Mapping[str, str]
    """Reader part → the norm between the stream and it; a part that reads the bare stream is absent."""
    post_norm: Mapping[str, str] = field(default_factory=dict)
    """Writer part → the norm between it and the stream; a part that writes straight into it is absent."""
    norm: NormKind = "rms"
    reader_layout: Literal["linear", "conv1d"] = "linear"
    bias_switch: Mapping[str, str] = field(default_factory=dict)
    """``attn`` or ``mlp`` → the configuration's key that gives all linear layers of that half a bias. Anchored
    edits need one to bake; a half without a key cannot have it."""
    refusal: Callable[[PreTrainedConfig], str] = _nothing
    """Why this configuration is not covered; empty where it is."""


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
}
"""By `config.model_type`."""


# ------------------------------------------------------------------------------------- reading it
def family_of(config: PreTrainedConfig) -> Family:
    """The declaration for this configuration; UnsupportedModelError where there is none that fits."""
    name = config.model_type
    if name not in FAMILIES:
        near = difflib.get_close_matches(name, FAMILIES, n=3) or sorted(FAMILIES)
        raise UnsupportedModelError(
            f"architecture '{name}' is not known (near: {', '.join(near)}): no entry in anatomy.FAMILIES; "
            "add one that declares its blocks, embeddings, norms, writers and readers"
        )
    if reason := FAMILIES[name].refusal(config):
        raise UnsupportedModelError(f"this '{name}' model is not supported: {reason}")
    return FAMILIES[name]


def find_sites(model: PreTrainedModel, family: Family) -> tuple[Site, ...]:
    """Every declared site: embeddings (layer −1), block by block, then the unembedding (layer L).

    UnsupportedModelError names the first module that is declared and not there.
    """
    sites = [Site(path, -1, "embed", "writes", "embedding") for path in family.embeds]
    for layer in range(n_layers_of(model, family)):
        sites += _block_sites(family, layer)
    norm = family.final_norm
    sites.append(Site(family.unembed, n_layers_of(model, family), "unembed", "reads", "linear", norm, family.norm))
    for site in sites:
        _check_site(model, site)
    return tuple(sites)


def n_layers_of(model: PreTrainedModel, family: Family) -> int:
    """How many decoder blocks the model has."""
    return len(list(_module(model, family.layers).children()))


def _block_sites(family: Family, layer: int) -> list[Site]:
    prefix = f"{family.layers}.{layer}."
    sites = []
    for part, (path, layout) in family.writers.items():
        gain = prefix + family.post_norm[part] if part in family.post_norm else None
        sites.append(Site(prefix + path, layer, part, "writes", layout, gain, family.norm))
    for part, paths in family.readers.items():
        gain = prefix + family.pre_norm[part] if part in family.pre_norm else None
        layout = family.reader_layout
        sites += [Site(prefix + path, layer, part, "reads", layout, gain, family.norm) for path in paths]
    return sites


def _check_site(model: PreTrainedModel, site: Site) -> None:
    if site.gain is not None:
        _module(model, site.gain)
    module = _module(model, site.path)
    stored: Layout = "linear"
    if isinstance(module, Conv1D):
        stored = "conv1d"
    elif isinstance(module, nn.Embedding):
        stored = "embedding"
    if stored != site.layout and not is_packed(module):  # packed matrices are [out, in], whatever they were
        raise UnsupportedModelError(f"{site.path} is declared as {site.layout} and is {stored}; mend anatomy.FAMILIES")


def _module(model: PreTrainedModel, path: str) -> nn.Module:
    try:
        module: nn.Module = model.get_submodule(path)
    except AttributeError as error:
        raise UnsupportedModelError(
            f"a '{model.config.model_type}' model is declared to have '{path}', and this one has not; "
            "mend its entry in anatomy.FAMILIES, or try the transformers version that it was written for"
        ) from error
    return module


def is_tied(model: PreTrainedModel) -> bool:
    """Whether embedding and unembedding share their storage, whatever the configuration says."""
    ends: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    table, head = (end.weight for end in ends)
    if table.is_meta or head.is_meta:
        return table is head
    return bool(table.untyped_storage().data_ptr() == head.untyped_storage().data_ptr())


def gain_of(subject: Subject, site: Site) -> Float[Tensor, " width"] | None:
    """γ, fp32: what the norm between this site and the stream multiplies by; None where nothing does."""
    return gain_in(subject.model, site)


def gain_in(model: PreTrainedModel, site: Site) -> Float[Tensor, " width"] | None:
    """`gain_of` for a bare model."""
    if site.gain is None:
        return None
    norm: Any = model.get_submodule(site.gain)
    if norm.weight is None:  # a LayerNorm without affine parameters
        return None
    gain: Tensor = norm.weight.detach().float()
    return 1.0 + gain if site.norm == "rms+1" else gain


def norm_bias_of(subject: Subject, site: Site) -> Float[Tensor, " width"] | None:
    """β, fp32: what the LayerNorm between this site and the stream adds; None where nothing does."""
    if site.gain is None:
        return None
    own = dict(subject.module(site.gain).named_parameters(recurse=False))
    return own["bias"].detach().float() if "bias" in own else None


# ---------------------------------------------------------------------------------------- coverage
@dataclass(frozen=True)
class Coverage:
    """How many matrix parameters of the backbone the sites claim. Vectors (norms, biases) are not counted."""

    writers: int
    readers: int
    unclaimed: int
    paths: tuple[str, ...]
    """Matrices that no site claims: nothing is known of them, so each could be a writer that was missed."""

    @property
    def share(self) -> float:
        """Writing parameters found; every unclaimed one counts as missed."""
        return self.writers / max(self.writers + self.unclaimed, 1)

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold, `share` included."""
        return {**asdict(self), "paths": list(self.paths), "share": self.share}


def coverage(model: PreTrainedModel, sites: tuple[Site, ...], family: Family) -> Coverage:
    """Count over the decoder blocks and all that stands beside them: embeddings, and whatever else."""
    backbone = family.layers.rpartition(".")[0] + "."
    role = {f"{site.path}.weight": site.role for site in sites}
    count = {"writes": 0, "reads": 0, "": 0}
    unclaimed = []
    for path, parameter in model.named_parameters():
        if not path.startswith(backbone) or parameter.ndim < 2:  # a vector can move the stream by a constant only
            continue
        count[role.get(path, "")] += prod(dims(parameter))
        if path not in role:
            unclaimed.append(path)
    return Coverage(count["writes"], count["reads"], count[""], tuple(unclaimed))
