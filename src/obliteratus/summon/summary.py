"""What can be edited in a model and what it will cost, without loading its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.pytorch_utils import Conv1D

from obliteratus.core.types import Site
from obliteratus.summon.architectures import Architecture
from obliteratus.summon.coverage import Coverage, table_coverage
from obliteratus.summon.experts import is_stack, replace_forward
from obliteratus.summon.load import DTYPES, dtype_of, read_config
from obliteratus.summon.sites import architecture_of, find_sites, is_tied, model_class_of, n_layers_of, width_of
from obliteratus.weights.quantization import Storage, choose_storage
from obliteratus.weights.sources import check_weights, locate


@dataclass(frozen=True)
class ModelSummary:
    """All that `obliteratus inspect` prints."""

    source: str
    quantisation: str
    """How most weights are stored: ``Q4_1``, ``bitsandbytes nf4``, ``fp8`` …; empty for plain floats."""
    packed: bool
    """Whether they stay so in memory; else they are loaded as plain floats."""
    model_type: str
    n_layers: int
    width: int
    n_params: int
    """Tied weights counted once."""
    tied: bool
    sites: tuple[Site, ...]
    coverage: Coverage
    dtype: str
    """In which it would be loaded."""
    weight_bytes: Mapping[str, int]
    """By dtype, were all of them plain."""
    loaded_bytes: int
    """Of the weights as they would be loaded."""
    block_bytes: int
    """The same of the largest decoder block."""
    inner: int
    """The longest side of a matrix in the first block."""
    table_bytes: int
    """The same of the embeddings, or of the head if it is larger."""
    vocabulary: int
    kv_bytes_per_token: int
    """In `dtype`; an upper bound where layers keep a sliding window only."""


def summarize_model(
    source: str | Path,
    *,
    dtype: str = "auto",
    revision: str = "",
    trust_remote_code: bool = False,
    quantise: str | Mapping[str, Any] = "",
) -> ModelSummary:
    """Read the configuration and build the model on the meta device. UserError as `open_subject`."""
    origin = locate(source)
    gguf = check_weights(origin) if origin.gguf else ""
    config = read_config(origin, revision, trust_remote_code)
    storage = choose_storage(origin, config, quantise, dtype_of(dtype))
    family = architecture_of(config)
    kind = loading_dtype(config, dtype)
    with torch.device("meta"):
        model = model_class_of(config).from_config(config, dtype=kind, trust_remote_code=trust_remote_code)
    sites = find_sites(model, family)
    n_params = _count(model)
    return ModelSummary(
        source=origin.name,
        quantisation=gguf or storage.label,
        packed=storage.packed,
        model_type=config.model_type,
        n_layers=n_layers_of(model, family),
        width=width_of(model),
        n_params=n_params,
        tied=is_tied(model),
        sites=sites,
        coverage=table_coverage(model, sites, family),
        dtype=str(kind).removeprefix("torch."),
        weight_bytes={"float32": 4 * n_params, "bfloat16": 2 * n_params, "float16": 2 * n_params},
        loaded_bytes=n_params * kind.itemsize - (_saved(model, storage, kind) if storage.packed else 0),
        block_bytes=max(_count(block) for block in model.get_submodule(family.layers).children()) * kind.itemsize,
        inner=max(max(p.shape) for p in next(model.get_submodule(family.layers).children()).parameters()),
        table_bytes=max(_count(end) for end in _ends(model)) * kind.itemsize,
        vocabulary=model.get_output_embeddings().weight.shape[0],
        kv_bytes_per_token=_kv_values(model, family) * kind.itemsize,
    )


def _count(module: nn.Module) -> int:
    """Parameters of a module and all in it."""
    return sum(parameter.numel() for parameter in module.parameters())


def _ends(model: PreTrainedModel) -> tuple[Any, ...]:
    return model.get_input_embeddings(), model.get_output_embeddings()


def _saved(model: PreTrainedModel, storage: Storage, kind: torch.dtype) -> int:
    """Bytes that packing spares: all linear layers but the head, with the scales of 64 codes or of a row, fp32."""
    head = model.get_output_embeddings()
    packed = [m.get_parameter("weight") for m in model.modules() if type(m) in (nn.Linear, Conv1D) and m is not head]
    n, rows = sum(w.numel() for w in packed), sum(len(w) for w in packed)
    return int(n * kind.itemsize - (n + 4 * rows if storage.label.endswith("int8") else n / 2 + 4 * n / 64))


def loading_dtype(config: PreTrainedConfig, name: str) -> torch.dtype:
    """What a model of that configuration is loaded in, where ``name`` is asked for (``auto``: as stored)."""
    asked = dtype_of(name)
    stored = torch.float32 if config.dtype is None else config.dtype  # GGUF files, for one, name none
    kind = stored if asked == "auto" else asked
    return kind if isinstance(kind, torch.dtype) else DTYPES[kind]


def _kv_values(model: PreTrainedModel, family: Architecture) -> int:
    """Numbers that the cache keeps of one token: seen on the meta device, so true of any attention. States that do not
    grow with the tokens, of state spaces and convolutions, are left out."""
    for module in model.modules():
        if is_stack(module):  # which experts are chosen is in values, which there are none of
            replace_forward(module, lambda x, *routing: x)
    token: dict[str, Tensor] = {"inputs_embeds": torch.zeros(1, 1, width_of(model), dtype=model.dtype, device="meta")}
    if family.beside:  # tables beside the embeddings are looked up by the token's number
        token = {"input_ids": torch.zeros(1, 1, dtype=torch.long, device="meta")}
    with torch.no_grad():
        out = model(**token, use_cache=True)
    cache = out["cache" if "cache" in out else "past_key_values"]  # its name before transformers 5.24
    grow = [layer for layer in cache.layers if isinstance(layer, DynamicLayer) and layer.is_initialized]
    return sum(states.numel() for layer in grow for states in (layer.keys, layer.values) if states is not None)
