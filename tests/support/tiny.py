"""Tiny random models of every architecture in the table, and a real byte-level tokenizer for them.

Weights are random, norm gains and biases lie well away from 1 and 0: an edit that forgets a gain, a bias or a
transposition shows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, PreTrainedTokenizerFast

from obliteratus.core.results import Run
from obliteratus.core.types import Subject
from obliteratus.pipeline.recipe import load_recipe
from obliteratus.summon.load import assemble_subject
from obliteratus.summon.sites import choose_model_class, stream_width

BOS, EOS, PAD = 256, 257, 258  # after the 256 bytes
VOCAB = 264
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role + ': ' + m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "tie_word_embeddings": False,
}
_GQA = {**_COMMON, "num_key_value_heads": 2, "intermediate_size": 56}
_WIDE = {"hidden_size": 48, "head_dim": 16}  # 4 heads of 16: attention's output matrix is [48, 64]
_SANDWICH = {**_GQA, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8, "num_hidden_layers": 3}
_TYPES = ["sliding_attention", "full_attention", "sliding_attention"]

_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
_MOE = {**_GQA, "moe_intermediate_size": 24, "num_experts_per_tok": 2}
_SHARED = {"shared_expert_intermediate_size": 40}
_GROUPS = {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
_MLA = {"kv_lora_rank": 12, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
_DEEPSEEK = {**_MOE, **_GROUPS, **_MLA, "num_key_value_heads": 4, "n_routed_experts": 4, "n_shared_experts": 2}

_MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
_DELTA = {
    **_MOE,
    "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_MIXERS = ["linear_attention", "moe", "full_attention", "mlp"]
_NEMOTRON = {
    **_MOE,
    "head_dim": 16,
    "n_routed_experts": 4,
    "moe_shared_expert_intermediate_size": 20,
    "ssm_state_size": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "n_groups": 1,
    "chunk_size": 8,
}
_NEMOTRON.pop("num_hidden_layers")
_GEMMA4 = {
    **{k: v for k, v in _SANDWICH.items() if k != "query_pre_attn_scalar"},
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    "vocab_size_per_layer_input": VOCAB,
}
_SIGLIP = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
_MROPE3 = {"rope_parameters": {**_MROPE["rope_parameters"], "mrope_section": [4, 2, 2]}}
_QWEN_EYE = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "out_hidden_size": 32}
_QWEN3_EYE = {
    "depth": 1,
    "hidden_size": 16,
    "num_heads": 2,
    "intermediate_size": 16,
    "out_hidden_size": 32,
    "deepstack_visual_indexes": [0],
    "num_position_embeddings": 16,
}

_UNTIED = {"tie_word_embeddings": False}

# name: (model_type, configuration)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**_GQA, "num_hidden_layers": 3}),
    "llama_biased": (
        "llama",
        {**_GQA, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "mistral": ("mistral", {**_GQA, **_WIDE, "sliding_window": None}),
    "qwen2": ("qwen2", {**_GQA, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {**_GQA, **_WIDE}),
    "smollm3": ("smollm3", {**_GQA, "tie_word_embeddings": True, "no_rope_layers": [1, 0]}),
    "phi3": ("phi3", _GQA),
    "olmo2": ("olmo2", _GQA),
    "gemma": ("gemma", {**_GQA, **_WIDE, "tie_word_embeddings": True}),
    "gemma2": ("gemma2", {**_SANDWICH, "layer_types": _TYPES, "tie_word_embeddings": True}),
    "gemma3_text": ("gemma3_text", {**_SANDWICH, "layer_types": _TYPES, "tie_word_embeddings": True}),
    "gpt2": ("gpt2", {**_COMMON, "tie_word_embeddings": True}),
    "gpt_neox": ("gpt_neox", {**_COMMON, "intermediate_size": 64, "use_parallel_residual": True}),
    "gpt_neox_sequential": ("gpt_neox", {**_COMMON, "intermediate_size": 64, "use_parallel_residual": False}),
    "opt": ("opt", {**_COMMON, "ffn_dim": 64, "word_embed_proj_dim": 32, "tie_word_embeddings": True}),
    "mixtral": ("mixtral", {**_MOE, "num_local_experts": 4}),
    "qwen2_moe": ("qwen2_moe", {**_MOE, **_SHARED, "num_experts": 4, "mlp_only_layers": [0]}),
    "qwen3_moe": ("qwen3_moe", {**_MOE, **_WIDE, "num_experts": 4, "mlp_only_layers": [0], "norm_topk_prob": False}),
    "olmoe": ("olmoe", {**_MOE, "num_experts": 4}),
    "deepseek_v2": ("deepseek_v2", {**_DEEPSEEK, "q_lora_rank": 12, "topk_method": "greedy"}),
    "deepseek_v3": ("deepseek_v3", {**_DEEPSEEK, "q_lora_rank": None, "routed_scaling_factor": 1.7}),
    "glm4_moe": ("glm4_moe", {**_MOE, **_GROUPS, "head_dim": 16, "n_routed_experts": 4, "n_shared_experts": 1}),
    "gpt_oss": ("gpt_oss", {**_GQA, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, **_ROPE}),
    "granitemoe": (
        "granitemoe",
        {**_MOE, "num_local_experts": 4, "residual_multiplier": 0.5, "embedding_multiplier": 3.0},
    ),
    "qwen3_next": ("qwen3_next", {**_DELTA, **_SHARED, "num_experts": 4, "mlp_only_layers": [0]}),
    "qwen3_5_text": ("qwen3_5_text", _DELTA),
    "qwen3_5_moe_text": ("qwen3_5_moe_text", {**_DELTA, **_SHARED, "num_experts": 4}),
    "granitemoehybrid": (
        "granitemoehybrid",
        {
            **_MOE,
            **_MAMBA2,
            "num_local_experts": 4,
            "shared_intermediate_size": 40,
            "layer_types": ["linear_attention", "full_attention"],
            "residual_multiplier": 0.5,
        },
    ),
    "granitemoehybrid_dense": (
        "granitemoehybrid",
        {
            **_GQA,
            **_MAMBA2,
            "num_local_experts": 0,
            "shared_intermediate_size": 40,
            "layer_types": ["full_attention", "linear_attention"],
        },
    ),
    "lfm2": ("lfm2", {**_GQA, "layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3}),
    "lfm2_moe": (
        "lfm2_moe",
        {**_MOE, "layer_types": ["conv", "full_attention"], "num_experts": 4, "num_dense_layers": 1},
    ),
    "jamba": (
        "jamba",
        {
            **_GQA,
            "num_hidden_layers": 3,
            "num_experts": 4,
            "attn_layer_period": 3,
            "attn_layer_offset": 1,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
        },
    ),
    "falcon_h1": (
        "falcon_h1",
        {
            **_GQA,
            **_MAMBA2,
            "mamba_d_ssm": 64,
            "attention_out_multiplier": 0.5,
            "attention_in_multiplier": 1.5,
            "ssm_out_multiplier": 0.7,
            "ssm_in_multiplier": 1.2,
            "mlp_multipliers": [1.3, 0.6],
        },
    ),
    "nemotron_h": ("nemotron_h", {**_NEMOTRON, "layers_block_type": _MIXERS}),
    "nemotron_h_latent": (
        "nemotron_h",
        {**_NEMOTRON, "layers_block_type": ["full_attention", "moe"], "moe_latent_size": 16},
    ),
    "gemma4_text": ("gemma4_text", {**_GEMMA4, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 1}),
    "gemma3": ("gemma3", {**_UNTIED, "text_config": {**_SANDWICH, "layer_types": _TYPES}, "vision_config": _SIGLIP}),
    "qwen2_vl": ("qwen2_vl", {**_UNTIED, "text_config": {**_GQA, **_MROPE}, "vision_config": _QWEN_EYE}),
    "qwen2_5_vl": ("qwen2_5_vl", {**_UNTIED, "text_config": {**_GQA, **_MROPE}, "vision_config": _QWEN_EYE}),
    "qwen3_vl": ("qwen3_vl", {**_UNTIED, "text_config": {**_GQA, **_WIDE, **_MROPE3}, "vision_config": _QWEN3_EYE}),
}


# Blocks of 64 codes share a scale: rows of whole blocks, as real models have.
BLOCKS = {"hidden_size": 64}


# Their tables differ from another's in names alone: what runs the model need not be tried on them as well.
ALIKE = (
    *("olmoe", "glm4_moe", "deepseek_v3", "qwen3_moe", "granitemoe", "qwen2_vl", "qwen2_5_vl"),
    *("qwen3_5_text", "qwen3_5_moe_text", "granitemoehybrid_dense", "lfm2", "nemotron_h_latent"),
)
KINDS = sorted(set(MODELS) - set(ALIKE))


def tiny_config(name: str, **changes: Any) -> Any:
    """The configuration of `name`."""
    model_type, options = MODELS[name]
    return AutoConfig.for_model(model_type, **{**options, **changes})


def tiny(name: str, seed: int = 0, **changes: Any) -> Any:
    """A random model in fp32 on the CPU, in eval mode, without gradients; changes: of its configuration."""
    config = tiny_config(name, **changes)
    model = choose_model_class(config).from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2:
                parameter.copy_(noise * stream_width(model) ** -0.5)  # unit-scale activations
            else:
                parameter.add_(0.3 * noise)  # gains start from 1 (or 0, where 1 is added), biases from 0
    return model.eval().requires_grad_(False)


def tiny_tokenizer(padding_side: str = "right") -> PreTrainedTokenizerFast:
    """One token a byte, then bos, eos and pad; a chat template with system, user and assistant turns."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_ = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytes_.decoder = decoders.ByteLevel()
    bytes_.add_special_tokens([AddedToken(t, special=True) for t in ("<bos>", "<eos>", "<pad>")])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytes_,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        padding_side=padding_side,
        model_max_length=256,
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def tiny_subject(name: str, seed: int = 0, padding_side: str = "right") -> Subject:
    """A subject as `open_subject` would make it."""
    return assemble_subject(tiny(name, seed), tiny_tokenizer(padding_side), id=f"tiny:{name}")


def run_of(subject: Subject) -> Run:
    """A run as `save` needs it, with nothing measured."""
    return Run(
        recipe=load_recipe("basic"),
        source={key: str(value) for key, value in vars(subject.source).items()},
        prompts={"digest": "0", "counts": {}},
        coverage={"parts": {}, "unclaimed": [], "edited_share": 0.5},
        versions={"obliteratus": "0"},
    )


def save_tiny(folder: Path, kind: str = "llama") -> Path:
    """Write a tiny model with its tokenizer, and return its folder."""
    tiny(kind).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
