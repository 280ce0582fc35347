"""Checkpoints of any size with random weights, written tensor by tensor: `python -m bench.synthetic FOLDER --gb 5`.

A Llama with SmolLM2's tokenizer. Its numbers mean nothing; its bytes and FLOPs are those of a real model of its size.
"""

from __future__ import annotations

import argparse
import math
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from obliteratus.weights.organism import prepare_base
from obliteratus.weights.safetensors_io import write_index, write_shard

SHARD = 500_000_000  # bytes of a file: several a checkpoint, none of which a limit of a third would hold in a row
DTYPE = torch.float32  # in which this machine computes fastest


def make_config(gb: float, width: int = 1536) -> LlamaConfig:
    """Of as many blocks as make up ``gb`` gigabytes. Feed-forward halves are 2.75 times as wide as the stream."""
    made = LlamaConfig(
        hidden_size=width,
        intermediate_size=11 * width // 4,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 128,
        num_hidden_layers=1,
        vocab_size=49152,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        tie_word_embeddings=False,
    )
    one, none = (_bytes(made, layers) for layers in (1, 0))
    made.num_hidden_layers = max(2, round((gb * 1e9 - none) / (one - none)))
    return made


def write_checkpoint(folder: Path, gb: float, width: int = 1536) -> Path:
    """The checkpoint, unless it is there."""
    if (folder / "model.safetensors.index.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    made = make_config(gb, width)
    made.architectures, made.dtype = ["LlamaForCausalLM"], DTYPE
    made.save_pretrained(folder)
    AutoTokenizer.from_pretrained(prepare_base()).save_pretrained(folder)
    like = _empty(made).state_dict()
    where: dict[str, str] = {}
    files = list(_files(like))
    for number, names in enumerate(files, 1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        own = {key: like[key] for key in names}
        write_shard(folder / name, own, {key: partial(_random, key, like[key]) for key in names})
        where |= dict.fromkeys(names, name)
    write_index(folder, where, sum(tensor.nbytes for tensor in like.values()))
    return folder


def _empty(made: LlamaConfig) -> LlamaForCausalLM:
    with torch.device("meta"):
        model: LlamaForCausalLM = AutoModelForCausalLM.from_config(made, dtype=DTYPE)
    return model


def _bytes(made: LlamaConfig, layers: int) -> int:
    made.num_hidden_layers = layers
    return sum(tensor.nbytes for tensor in _empty(made).state_dict().values())


def _files(like: dict[str, Tensor]) -> Iterator[list[str]]:
    names: list[str] = []
    for name in like:
        if names and sum(like[other].nbytes for other in [*names, name]) > SHARD:
            yield names
            names = []
        names.append(name)
    yield names


def _random(name: str, like: Tensor) -> Iterator[Tensor]:
    """Norms are ones. Matrices are such that streams grow slowly, as trained ones do."""
    if like.ndim == 1:
        yield torch.ones(like.shape, dtype=like.dtype)
        return
    chance = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    scale = 0.5 / math.sqrt(like.shape[1])  # half of what keeps a vector's length
    for rows in torch.empty(len(like), 0).split(1024):  # 1024 rows at a time: 6 MB, so that no matrix is held
        yield torch.randn(len(rows), like.shape[1], generator=chance).mul_(scale).to(like.dtype)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gb", type=float, default=5.0)
    parser.add_argument("--width", type=int, default=1536)
    options = parser.parse_args()
    write_checkpoint(options.folder, options.gb, options.width)
