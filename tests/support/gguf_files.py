"""A tiny GGUF file."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from tests.support.tiny import BOS, EOS, PAD, TEMPLATE, VOCAB, tiny, tiny_tokenizer


def write_gguf(file: Path) -> Path:
    """The tiny Llama as a GGUF file in fp32, with its byte tokenizer."""
    model, tokenizer = tiny("llama"), tiny_tokenizer()
    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("gpt2")
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    tokens += ["hi", *(f"<unused{i}>" for i in range(len(tokens) + 1, VOCAB))]
    writer.add_token_list(tokens)
    writer.add_token_merges(["h i"])
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_pad_token_id(PAD)
    writer.add_chat_template(TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for path, weight in model.state_dict().items():
        name = names.get_name(path, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(name, np.ascontiguousarray(weight.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
