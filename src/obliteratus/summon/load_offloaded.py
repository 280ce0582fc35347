"""SUMMON for models larger than memory: loads everything but the weights, which stay on disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.hooks import attach_align_device_hook
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from obliteratus.core.chat import DEFAULT_CHAT, ChatFormat
from obliteratus.core.errors import UserError
from obliteratus.core.types import Subject
from obliteratus.summon.load import assemble_subject, load_config_and_tokenizer, resolve_commit, resolve_loading_dtype
from obliteratus.summon.sites import choose_model_class, find_architecture, find_end_paths, find_tied_parameters
from obliteratus.weights.checkpoint import Checkpoint, open_origin
from obliteratus.weights.devices import resolve_device_type
from obliteratus.weights.offload import OffloadedWeights
from obliteratus.weights.quantization import choose_storage_format
from obliteratus.weights.sources import ModelOrigin, check_weights, locate

Options = Mapping[str, Any]


def open_offloaded(source: str | Path, *, chat: ChatFormat = DEFAULT_CHAT, **options: Any) -> Subject:
    """Load a subject like `open_subject`, but leave all weights on disk: each block's are read when it runs.

    Anything that runs on a model in memory runs on this one, but every pass reads all weights. `hidden_states` and
    `logits` read them once for all prompts. options: dtype, device, revision and trust_remote_code.

    Raises UserError as `open_subject`, and if the weights are not stored as plain numbers, tensor by tensor, or if
    blocks use what other blocks computed.
    """
    origin = locate(source)
    _check_plain(origin, options)
    config, tokenizer = load_config_and_tokenizer(origin, options, chat)
    dtype = resolve_loading_dtype(config, options.get("dtype", "auto"))
    model = _build_empty_model(origin, config, dtype, options)
    revision = options.get("revision", "")
    device = _resolve_device(options.get("device", "auto"))
    offloaded = _offload_weights(open_origin(origin, model, revision), model, device)
    attach_align_device_hook(model, device, offload=True, weights_map=offloaded)
    _fill_buffers(model, offloaded)
    folder = offloaded.checkpoint.folder
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    commit = resolve_commit(origin, revision)
    return assemble_subject(model, tokenizer, id=origin.name, revision=commit, chat=chat, offloaded=offloaded)


def _check_plain(origin: ModelOrigin, options: Options) -> None:
    if origin.gguf or options.get("quantize"):
        what = "a GGUF file" if origin.gguf else "a model quantized on loading"
        raise UserError(f"{origin.name}: {what} cannot stay on disk; allow more memory, or give safetensors files")
    check_weights(origin)


def _build_empty_model(
    origin: ModelOrigin, config: PreTrainedConfig, dtype: torch.dtype, options: Options
) -> PreTrainedModel:
    """Return the model with meta parameters and real buffers."""
    if choose_storage_format(origin, config, "", dtype).label:
        raise UserError(f"{origin.name}: a quantized checkpoint cannot stay on disk; give the full-precision one")
    if find_architecture(config).shares_state_across_layers:
        raise UserError(f"{origin.name}: its blocks use what other blocks computed, so they cannot run one by one")
    trust = bool(options.get("trust_remote_code"))
    with init_empty_weights(include_buffers=False), _EmptyOnMeta():
        model: PreTrainedModel = choose_model_class(config).from_config(config, dtype=dtype, trust_remote_code=trust)
    model.tie_weights()  # init_empty_weights replaces parameters, which unties them
    model.eval().requires_grad_(False)
    return model


class _EmptyOnMeta(TorchFunctionMode):
    """Makes torch.empty, which allocates matrices, return meta tensors, while computed tensors, such as positions, stay
    real."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        meta = {"device": "meta"} if func is torch.empty else {}
        return func(*args, **{**(kwargs or {}), **meta})


def _offload_weights(checkpoint: Checkpoint, model: PreTrainedModel, device: torch.device) -> OffloadedWeights:
    """Blocks, embedding and head are dropped after use; all else, such as norms and positions, stays in memory."""
    state: dict[str, Tensor] = dict(model.state_dict(keep_vars=True))
    tied = find_tied_parameters(model)
    blocks = f"{find_architecture(model.config).layers}."
    ends = {f"{path}.weight" for path in find_end_paths(model)}
    transient = {name for name in state if name.startswith(blocks) or name in ends}
    return OffloadedWeights(checkpoint, state, transient, {tied[1]: tied[0]} if tied else {}, device)


def _fill_buffers(model: PreTrainedModel, offloaded: OffloadedWeights) -> None:
    """Load stored buffers, such as a router's correction, which are small and stay in memory."""
    for name, buffer in model.named_buffers():
        if name in offloaded:
            buffer.copy_(offloaded[name])


def _resolve_device(name: str) -> torch.device:
    """Return the one device that blocks run on."""
    if name in ("auto", "map"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "tp":
        raise UserError("device 'tp': offloaded models run on one device; name that device, or use device='auto'")
    resolve_device_type(name)
    return torch.device(name)
