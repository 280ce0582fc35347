"""What can be edited in a model and how much memory it takes, from its configuration and without its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.pytorch_utils import Conv1D

from obliteratus.core.types import Coverage, Site
from obliteratus.summon.architectures import Architecture
from obliteratus.summon.coverage import count_coverage
from obliteratus.summon.experts import is_expert_stack, replace_forward
from obliteratus.summon.load import parse_dtype, read_config, resolve_loading_dtype
from obliteratus.summon.sites import (
    choose_model_class,
    find_architecture,
    find_sites,
    is_tied,
    list_blocks,
    stream_width,
)
from obliteratus.weights.quantization import StorageFormat, choose_storage_format
from obliteratus.weights.sources import check_weights, locate


@dataclass(frozen=True)
class ModelSummary:
    """All that `obliteratus inspect` prints."""

    source: str
    quantization: str
    """How most weights are stored: ``Q4_1``, ``bitsandbytes nf4``, ``fp8`` …; empty for plain floats."""
    packed: bool
    """Whether they stay packed in memory; otherwise they are loaded as plain floats."""
    model_type: str
    n_layers: int
    width: int
    n_params: int
    """Number of parameters; tied weights count once."""
    tied: bool
    sites: tuple[Site, ...]
    coverage: Coverage
    dtype: str
    """The dtype in which the model would be loaded."""
    weight_bytes: Mapping[str, int]
    """Bytes of all weights by dtype, without packing."""
    loaded_bytes: int
    """Bytes of all weights as they would be loaded."""
    block_bytes: int
    """Bytes of the largest decoder block in `dtype`, without packing."""
    longest_side: int
    """The longest side of a matrix in the first block."""
    table_bytes: int
    """Bytes of the embedding or the head, whichever is larger, in `dtype`."""
    vocabulary: int
    kv_bytes_per_token: int
    """Bytes of the key-value cache in `dtype`; an upper bound where layers keep a sliding window only."""


def summarize_model(
    source: str | Path,
    *,
    dtype: str = "auto",
    revision: str = "",
    trust_remote_code: bool = False,
    quantize: str | Mapping[str, Any] = "",
) -> ModelSummary:
    """Describe a model, built from its configuration on the meta device. Raises UserError as `open_subject`."""
    origin = locate(source)
    gguf = check_weights(origin) if origin.gguf else ""
    config = read_config(origin, revision, trust_remote_code)
    storage = choose_storage_format(origin, config, quantize, parse_dtype(dtype))
    architecture = find_architecture(config)
    loaded = resolve_loading_dtype(config, dtype)
    with torch.device("meta"):
        model = choose_model_class(config).from_config(config, dtype=loaded, trust_remote_code=trust_remote_code)
    sites, blocks = find_sites(model, architecture), list_blocks(model, architecture)
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    n_params = _count_parameters(model)
    saved_bytes = _count_packing_savings(model, storage, loaded) if storage.packed else 0
    return ModelSummary(
        source=origin.name,
        quantization=gguf or storage.label,
        packed=storage.packed,
        model_type=config.model_type,
        n_layers=len(blocks),
        width=stream_width(model),
        n_params=n_params,
        tied=is_tied(model),
        sites=sites,
        coverage=count_coverage(model, sites, architecture),
        dtype=str(loaded).removeprefix("torch."),
        weight_bytes={"float32": 4 * n_params, "bfloat16": 2 * n_params, "float16": 2 * n_params},
        loaded_bytes=n_params * loaded.itemsize - saved_bytes,
        block_bytes=max(map(_count_parameters, blocks)) * loaded.itemsize,
        longest_side=max(max(p.shape) for p in blocks[0].parameters()),
        table_bytes=max(map(_count_parameters, ends)) * loaded.itemsize,
        vocabulary=ends[1].weight.shape[0],
        kv_bytes_per_token=_count_kv_values(model, architecture) * loaded.itemsize,
    )


def _count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _count_packing_savings(model: PreTrainedModel, storage: StorageFormat, dtype: torch.dtype) -> int:
    """Return the bytes that packing saves: it packs all linear layers but the head, and adds fp32 scales, one for each
    64 codes (4 bits) or each row (8 bits)."""
    head = model.get_output_embeddings()
    packed = [m.get_parameter("weight") for m in model.modules() if type(m) in (nn.Linear, Conv1D) and m is not head]
    n, rows = sum(w.numel() for w in packed), sum(len(w) for w in packed)
    return int(n * dtype.itemsize - (n + 4 * rows if storage.label.endswith("int8") else n / 2 + 4 * n / 64))


def _count_kv_values(model: PreTrainedModel, architecture: Architecture) -> int:
    """Return how many numbers the cache keeps for one token, measured by a forward pass on the meta device.

    This holds for any attention. States that do not grow with the tokens, as of state spaces and convolutions, are not
    counted.
    """
    for module in model.modules():
        if is_expert_stack(module):  # the chosen experts depend on values, which meta tensors do not have
            replace_forward(module, lambda x, *routing: x)
    token: dict[str, Tensor] = {
        "inputs_embeds": torch.zeros(1, 1, stream_width(model), dtype=model.dtype, device="meta")
    }
    if architecture.inner_outside_blocks:  # tables beside the embeddings are indexed by the token's id
        token = {"input_ids": torch.zeros(1, 1, dtype=torch.long, device="meta")}
    with torch.no_grad():
        out = model(**token, use_cache=True)
    cache = out["cache" if "cache" in out else "past_key_values"]  # the name before transformers 5.24
    growing = [layer for layer in cache.layers if isinstance(layer, DynamicLayer) and layer.is_initialized]
    return sum(states.numel() for layer in growing for states in (layer.keys, layer.values) if states is not None)
