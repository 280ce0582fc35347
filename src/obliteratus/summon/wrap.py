"""A model that is in memory already, with or without adapters of PEFT, as a `Subject`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from obliteratus.core.chat import DEFAULT_CHAT, ChatFormat
from obliteratus.core.errors import UnsupportedModelError, UserError
from obliteratus.core.progress import note
from obliteratus.core.types import Subject
from obliteratus.summon.chat_format import check_format
from obliteratus.summon.digest import compute_digest, make_weight_sampler
from obliteratus.summon.load import assemble_subject
from obliteratus.weights.adapters import find_adapted, plain_module, without_adapters
from obliteratus.weights.bitsandbytes import is_packed
from obliteratus.weights.devices import gather_hook_inputs
from obliteratus.weights.finite import check_finite
from obliteratus.weights.quantization import quantization_label, quantization_method, read_quantization_config

MEMORY = "memory:"
"""Begins the name of every model that was in memory. No file and no hub id begins so, hence none is taken for it."""


def wrap(model: Any, tokenizer: Any, *, id: str = "", chat: ChatFormat = DEFAULT_CHAT) -> Subject:
    """Return the subject of a transformers model that is in memory, on whatever device, also under PEFT.

    Adapters take part as they are active: what is found, edited and measured is the model with them. The model is put
    into evaluation mode and its weights are frozen (``requires_grad``), as a note says if they were not; nothing else
    of it is changed. id: a name for records, after ``memory:``. chat: how prompts are rendered.

    Raises UserError for what is no such model, for adapters that are no part of its layers, for NaN or Inf in its
    weights, and UnsupportedModelError if the architecture table does not cover it.

    >>> ob.wrap(model, tokenizer, id="mine")
    <Subject: memory:mine, 8 blocks of width 32 in float32, 58 sites>
    """
    inner = _find_model(model)
    name = MEMORY + (id or str(inner.name_or_path).rstrip("/").rpartition("/")[2] or type(inner).__name__)
    _check_tokenizer(tokenizer, chat, name)
    _check_adapters(inner, name)
    _freeze(inner, name)
    check_finite(inner, name)
    gather_hook_inputs(inner)
    with without_adapters(inner):
        subject = assemble_subject(inner, tokenizer, id=name, quantization=_name_quantization(inner), chat=chat)
    if not find_adapted(inner):
        return subject
    digest = compute_digest(inner, subject.sites, make_weight_sampler(inner, "", "", None))
    return replace(subject, source=replace(subject.source, digest=digest))


def _find_model(model: Any) -> PreTrainedModel:
    """Return the transformers model, which PEFT's own class has inside."""
    peft: Any = sys.modules.get("peft")
    if peft is not None and isinstance(model, peft.PeftModel | peft.PeftMixedModel):
        if isinstance(model, peft.PeftModel) and model.active_peft_config.is_prompt_learning:
            raise UserError("wrap: the model has a learned prompt, which no edit of weights sees; unload it first")
        model = model.get_base_model()
    if not isinstance(model, PreTrainedModel):
        raise UserError(
            f"wrap: this is a {type(model).__module__}.{type(model).__name__}; give the transformers model itself, or "
            "use open_subject for a folder, a file or a hub id"
        )
    return model


def _check_tokenizer(tokenizer: Any, chat: ChatFormat, name: str) -> None:
    if isinstance(tokenizer, str) or not callable(tokenizer):
        raise UserError("wrap: give the model's tokenizer, as AutoTokenizer.from_pretrained(…) returns it")
    check_format(tokenizer, chat, name)
    if not tokenizer.chat_template:
        note("SUMMON", f"{name} has no chat template: prompts are given as raw text")


def _check_adapters(model: PreTrainedModel, name: str) -> None:
    """Raise UserError for adapters whose part in a matrix cannot be read."""
    for path in find_adapted(model):
        module = plain_module(model.get_submodule(path))
        if is_packed(module):
            raise UserError(
                f"{name}: {path} is quantized under its adapter; merge the adapter into full precision first"
            )
        if not isinstance(module, nn.Linear | nn.Embedding) and len(next(iter(module.parameters())).shape) != 2:
            raise UnsupportedModelError(f"{name}: the adapter of {path} is of many matrices; merge it first")
    for path, module in _wrapped_for_training(model):
        raise UnsupportedModelError(
            f"{name}: {path} is trained beside its adapters ({type(module).__name__}); merge the adapter first"
        )


def _wrapped_for_training(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that PEFT trains as a whole (``modules_to_save``) or in parts."""
    peft: Any = sys.modules.get("peft.utils.other")
    if peft is not None:
        yield from ((p, m) for p, m in model.named_modules() if isinstance(m, peft.AuxiliaryTrainingWrapper))


def _freeze(model: PreTrainedModel, name: str) -> None:
    trained = [path for path, parameter in model.named_parameters() if parameter.requires_grad]
    if model.training or trained:
        note("SUMMON", f"{name} is put into evaluation mode, and its {len(trained)} trainable tensors are frozen")
    model.eval().requires_grad_(False)


def _name_quantization(model: PreTrainedModel) -> str:
    """Return how a model is quantized in memory. Raises UnsupportedModelError for what cannot be edited."""
    entry = read_quantization_config(model.config)
    method = quantization_method(entry) if entry else ""
    if not method:
        return ""
    if method != "bitsandbytes":
        raise UnsupportedModelError(f"the model is quantized as {method}; open it with open_subject, or dequantize it")
    return quantization_label(entry)
