"""SUMMON for models larger than memory: everything but the weights is loaded, and these stay in their files."""

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

from obliteratus.core.errors import UserError
from obliteratus.core.types import Subject
from obliteratus.summon.load import assemble_subject, commit_of, config_and_tokenizer
from obliteratus.summon.sites import architecture_of, end_paths, model_class_of, tied_ends
from obliteratus.summon.summary import loading_dtype
from obliteratus.weights.checkpoint import Checkpoint, open_files
from obliteratus.weights.devices import device_kind
from obliteratus.weights.offload import OffloadedWeights
from obliteratus.weights.quantization import choose_storage
from obliteratus.weights.sources import ModelOrigin, check_weights, locate

Options = Mapping[str, Any]


def open_offloaded(source: str | Path, *, thinking: bool = False, **options: Any) -> Subject:
    """`open_subject`, with all weights left on disk: each block's are read when it is to run (`sweep`).

    Anything runs on such a model as it would in memory, only that a pass reads all weights; `forward.read` and
    `logits.first_token_log_probs` read them once for all prompts. options: dtype, device, revision, trust_remote_code.
    UserError as `open_subject`, and where the weights are not stored as plain numbers, tensor by tensor, or blocks use
    what others computed.
    """
    origin = locate(source)
    _check_plain(origin, options)
    config, tokenizer = config_and_tokenizer(origin, options)
    kind = loading_dtype(config, options.get("dtype", "auto"))
    model = _empty(origin, config, kind, options)
    revision = options.get("revision", "")
    shelf = _shelf(open_files(origin, model, revision), model, _device(options.get("device", "auto")))
    attach_align_device_hook(model, shelf.device, offload=True, weights_map=shelf)
    _fill_buffers(model, shelf)
    if (shelf.files.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(shelf.files.folder)
    told = {"id": origin.name, "revision": commit_of(origin, revision)}
    return assemble_subject(model, tokenizer, **told, thinking=thinking, shelf=shelf)


def _check_plain(origin: ModelOrigin, options: Options) -> None:
    if origin.gguf or options.get("quantise"):
        what = "a GGUF file" if origin.gguf else "a model quantised on loading"
        raise UserError(f"{origin.name}: {what} cannot stay on disk; allow more memory, or give safetensors files")
    check_weights(origin)


def _empty(origin: ModelOrigin, config: PreTrainedConfig, kind: torch.dtype, options: Options) -> PreTrainedModel:
    """The model without weights: parameters have shapes alone, buffers are real."""
    if choose_storage(origin, config, "", kind).label:
        raise UserError(f"{origin.name}: a quantised checkpoint cannot stay on disk; give the full-precision one")
    if architecture_of(config).hands_on:
        raise UserError(f"{origin.name}: its blocks use what other blocks computed, so they cannot run one by one")
    trust = bool(options.get("trust_remote_code"))
    with init_empty_weights(include_buffers=False), _Unallocated():
        model: PreTrainedModel = model_class_of(config).from_config(config, dtype=kind, trust_remote_code=trust)
    model.tie_weights()  # what was tied as it was built came apart when its parameters lost their numbers
    model.eval().requires_grad_(False)
    return model


class _Unallocated(TorchFunctionMode):
    """Inside, what is made without numbers, as matrices are, gets no memory; what is computed, as positions, does."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        more = {"device": "meta"} if func is torch.empty else {}
        return func(*args, **{**(kwargs or {}), **more})


def _shelf(files: Checkpoint, model: PreTrainedModel, device: torch.device) -> OffloadedWeights:
    """Blocks and tables come and go; what else there is, norms and positions, stays."""
    state: dict[str, Tensor] = dict(model.state_dict(keep_vars=True))
    tied = tied_ends(model)
    blocks = f"{architecture_of(model.config).layers}."
    ends = {f"{path}.weight" for path in end_paths(model)}
    passing = {name for name in state if name.startswith(blocks) or name in ends}
    return OffloadedWeights(files, state, passing, {tied[1]: tied[0]} if tied else {}, device)


def _fill_buffers(model: PreTrainedModel, shelf: OffloadedWeights) -> None:
    """Buffers that are stored, such as a router's correction: small, so they stay in memory."""
    for name, buffer in model.named_buffers():
        if name in shelf:
            buffer.copy_(shelf[name])


def _device(name: str) -> torch.device:
    """One device: that is where a block runs."""
    if name in ("auto", "map"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "tp":
        raise UserError("device 'tp': blocks that stay on disk run on one device; name that, or use device='auto'")
    device_kind(name)
    return torch.device(name)
