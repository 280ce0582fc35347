"""Tiny random models of every architecture in the table, and a real byte-level tokenizer for them.

Weights are random, norm gains and biases lie well away from 1 and 0: an edit that forgets a gain, a bias or a
transposition shows.
"""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from obliteratus.recipe import recipe
from obliteratus.summon.open import assemble
from obliteratus.types import Run, Subject

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
}


# Blocks of 64 codes share a scale: rows of whole blocks, as real models have.
BLOCKS = {"hidden_size": 64}


def tiny_config(name: str, **changes: Any) -> Any:
    """The configuration of `name`."""
    model_type, options = MODELS[name]
    return AutoConfig.for_model(model_type, **{**options, **changes})


def tiny(name: str, seed: int = 0, **changes: Any) -> Any:
    """A random model in fp32 on the CPU, in eval mode, without gradients; changes: of its configuration."""
    model = AutoModelForCausalLM.from_config(tiny_config(name, **changes), dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2:
                parameter.copy_(noise * model.config.hidden_size**-0.5)  # unit-scale activations
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
    return assemble(tiny(name, seed), tiny_tokenizer(padding_side), id=f"tiny:{name}")


def run_of(subject: Subject) -> Run:
    """A run as `save` needs it, with nothing measured."""
    return Run(
        recipe=recipe("basic"),
        source={key: str(value) for key, value in vars(subject.source).items()},
        prompts={"digest": "0", "counts": {}},
        coverage={"parts": {}, "unclaimed": [], "edited_share": 0.5},
        versions={"obliteratus": "0"},
    )
