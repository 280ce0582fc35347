"""Tiny models as GGUF files in fp32, with a byte tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tests.support.tiny import BOS, EOS, PAD, TEMPLATE, VOCAB, tiny, tiny_tokenizer

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
}
# transformers takes its defaults for what it does not read from GGUF files, whatever the file says.
CHANGES: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 128},
    "qwen3_moe": {"head_dim": 128, "moe_intermediate_size": 768, "mlp_only_layers": []},
}


def write_gguf(file: Path, name: str = "llama", seed: int = 0, **changes: Any) -> Path:
    """Write the tiny model of that name. changes: of its configuration."""
    model = tiny(name, seed, **{**CHANGES.get(name, {}), **changes})
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[ARCHITECTURES[name]])
    _add_sizes(writer, model.config)
    _add_tokenizer(writer)
    names = gguf.get_tensor_name_map(ARCHITECTURES[name], model.config.num_hidden_layers)
    for path, weight in _list_tensors(model):
        stored = names.get_name(path, try_suffixes=(".weight", ".bias"))
        assert stored is not None, path
        writer.add_tensor(stored, np.ascontiguousarray(weight.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _list_tensors(model: Any) -> list[tuple[str, Any]]:
    """Return names and tensors as GGUF has them, with readers of experts apart."""
    found = []
    for path, weight in model.state_dict().items():
        if path == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        if path.endswith("experts.gate_up_proj"):
            gate, up = weight.chunk(2, dim=1)
            found += [
                (path.replace("gate_up_proj", f"{part}_proj.weight"), half)
                for part, half in (("gate", gate), ("up", up))
            ]
        elif path.endswith("experts.down_proj"):
            found.append((f"{path}.weight", weight))
        else:
            found.append((path, weight))
    return found


def _add_sizes(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(VOCAB)
    if head := config.to_dict().get("head_dim"):
        writer.add_key_length(head)
        writer.add_value_length(head)
    if window := config.to_dict().get("sliding_window"):
        writer.add_sliding_window(window)
    if experts := config.to_dict().get("num_experts") or config.to_dict().get("num_local_experts"):
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)


def _add_tokenizer(writer: gguf.GGUFWriter) -> None:
    vocabulary = tiny_tokenizer().get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    tokens += ["hi", *(f"<unused{i}>" for i in range(len(tokens) + 1, VOCAB))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges(["h i"])
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_pad_token_id(PAD)
    writer.add_chat_template(TEMPLATE)
