"""Write a checkpoint of any size with random weights: `python -m bench.synthetic FOLDER --gb 5`.

It is a Llama with SmolLM2's tokenizer. Its outputs mean nothing, but its bytes and FLOPs are those of a real model.
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

SHARD = 500_000_000  # bytes of a file, so that a checkpoint has several
DTYPE = torch.float32  # in which this machine computes fastest


def make_config(gb: float, width: int = 1536) -> LlamaConfig:
    """Return a configuration with enough blocks for ``gb`` gigabytes; MLPs are 2.75 times as wide as the stream."""
    config = LlamaConfig(
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
    one, none = (_bytes(config, layers) for layers in (1, 0))
    config.num_hidden_layers = max(2, round((gb * 1e9 - none) / (one - none)))
    return config


def write_checkpoint(folder: Path, gb: float, width: int = 1536) -> Path:
    """Write the checkpoint if the folder has none, and return the folder."""
    if (folder / "model.safetensors.index.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config = make_config(gb, width)
    config.architectures, config.dtype = ["LlamaForCausalLM"], DTYPE
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(prepare_base()).save_pretrained(folder)
    shapes = _empty(config).state_dict()
    where: dict[str, str] = {}
    files = list(_files(shapes))
    for number, names in enumerate(files, 1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        own = {key: shapes[key] for key in names}
        write_shard(folder / name, own, {key: partial(_random, key, shapes[key]) for key in names})
        where |= dict.fromkeys(names, name)
    write_index(folder, where, sum(tensor.nbytes for tensor in shapes.values()))
    return folder


def _empty(config: LlamaConfig) -> LlamaForCausalLM:
    with torch.device("meta"):
        model: LlamaForCausalLM = AutoModelForCausalLM.from_config(config, dtype=DTYPE)
    return model


def _bytes(config: LlamaConfig, layers: int) -> int:
    config.num_hidden_layers = layers
    return sum(tensor.nbytes for tensor in _empty(config).state_dict().values())


def _files(shapes: dict[str, Tensor]) -> Iterator[list[str]]:
    names: list[str] = []
    for name in shapes:
        if names and sum(shapes[other].nbytes for other in [*names, name]) > SHARD:
            yield names
            names = []
        names.append(name)
    yield names


def _random(name: str, shapes: Tensor) -> Iterator[Tensor]:
    """Yield the values of a tensor: ones for norms, else such that streams grow slowly, as in trained models."""
    if shapes.ndim == 1:
        yield torch.ones(shapes.shape, dtype=shapes.dtype)
        return
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    scale = 0.5 / math.sqrt(shapes.shape[1])  # half of what would keep a vector's length
    for rows in torch.empty(len(shapes), 0).split(1024):  # 6 MB at a time, so that no whole matrix is in memory
        yield torch.randn(len(rows), shapes.shape[1], generator=generator).mul_(scale).to(shapes.dtype)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gb", type=float, default=5.0, help="size of the checkpoint in gigabytes")
    parser.add_argument("--width", type=int, default=1536, help="width of the stream")
    options = parser.parse_args()
    write_checkpoint(options.folder, options.gb, options.width)
