"""Decides how weights are loaded (packed, as floats, or not at all) from a model's configuration alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from transformers import BitsAndBytesConfig, FineGrainedFP8Config, PreTrainedConfig
from transformers.utils.quantization_config import Mxfp4Config, QuantizationMethod

from obliteratus.core.choices import check_quantization
from obliteratus.core.errors import UnsupportedModelError, UserError
from obliteratus.weights.sources import ModelOrigin

QUANTIZE_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    # nf4 is the more accurate of the two 4-bit codes on every weight that was tried.
    "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "8bit": {"load_in_8bit": True},
}
"""The values of ``quantize`` and the options of BitsAndBytesConfig that they stand for."""
SUPPORTED = "bitsandbytes in 4 and 8 bits, GGUF, and FP8, MXFP8 and MXFP4 (loaded as bfloat16) are supported"
NEEDS_KERNELS = "its packed weights are read by kernels of its own, and writing them again needs calibration data"
# Methods that transformers knows and this package does not support, each with the reason.
REFUSED: Mapping[str, str] = {
    "gptq": NEEDS_KERNELS,
    "awq": NEEDS_KERNELS,
    "auto-round": NEEDS_KERNELS,
    "compressed-tensors": "the name covers many formats, and none of them can be written again here",
    **dict.fromkeys(
        ("aqlm", "bitnet", "eetq", "fbgemm_fp8", "fouroversix", "fp_quant", "gemma", "higgs", "hqq"), NEEDS_KERNELS
    ),
    **dict.fromkeys(("metal", "nvfp4", "quanto", "quark", "sinq", "spqr", "torchao", "vptq"), NEEDS_KERNELS),
}
LOADED_AS_FLOATS: Mapping[str, Any] = {
    "fp8": FineGrainedFP8Config,
    "mxfp8": FineGrainedFP8Config,
    "mxfp4": Mxfp4Config,
}
"""Methods whose weights are dequantized on loading, each with transformers' configuration class."""


@dataclass(frozen=True)
class StorageFormat:
    """How a model's weights are stored and loaded."""

    label: str = ""
    """``bitsandbytes nf4``, ``fp8`` …; empty for plain floats."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Arguments for from_pretrained."""
    packed: bool = False
    """Whether weights stay packed in memory."""
    quantized_on_loading: bool = False
    """Whether the weights are plain on disk and are quantized when they are loaded."""


def choose_storage_format(
    origin: ModelOrigin,
    config: PreTrainedConfig,
    quantize: str | Mapping[str, Any] = "",
    dtype: torch.dtype | str = "auto",
) -> StorageFormat:
    """Return how to load the model. quantize: a name in `QUANTIZE_OPTIONS`, or options of BitsAndBytesConfig.

    Raises UserError if the model cannot be quantized as asked, UnsupportedModelError if its format cannot be edited.
    """
    entry = read_quantization_config(config)
    if quantize:
        _check_can_quantize(origin, entry)
        return _quantize_on_loading(quantize, config.dtype if dtype == "auto" else dtype)
    if not entry or origin.gguf:  # GGUF files have an entry of their own, and are dequantized
        return StorageFormat()
    method = quantization_method(entry)
    if method == "bitsandbytes":
        _check_package(origin)
        return StorageFormat(quantization_label(entry), packed=True)
    if method in LOADED_AS_FLOATS:
        return StorageFormat(method, {"quantization_config": LOADED_AS_FLOATS[method](dequantize=True)})
    raise UnsupportedModelError(_refusal_message(origin, method))


def read_quantization_config(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the configuration's ``quantization_config``; empty if there is none."""
    entry = vars(config).get("quantization_config")
    if entry is None:
        return {}
    return dict(entry) if isinstance(entry, Mapping) else dict(entry.to_dict())


def quantization_method(entry: Mapping[str, Any]) -> str:
    """Return the method as files name it: ``bitsandbytes``, ``gptq`` … Old bitsandbytes files name none."""
    if entry.get("load_in_4bit") or entry.get("load_in_8bit"):
        return "bitsandbytes"
    method = entry.get("quant_method", "")
    return str(method.value if isinstance(method, QuantizationMethod) else method)


def quantization_label(entry: Mapping[str, Any]) -> str:
    """Return ``bitsandbytes nf4``, ``bitsandbytes fp4`` or ``bitsandbytes int8`` for a bitsandbytes entry."""
    kind = entry.get("bnb_4bit_quant_type", "fp4") if entry.get("load_in_4bit") else "int8"
    return f"bitsandbytes {kind}"


def _quantize_on_loading(quantize: str | Mapping[str, Any], dtype: Any) -> StorageFormat:
    if isinstance(quantize, str):
        check_quantization(quantize)
    options = dict(QUANTIZE_OPTIONS[quantize] if isinstance(quantize, str) else quantize)
    options.setdefault("bnb_4bit_compute_dtype", torch.float32 if dtype is None else dtype)
    config = BitsAndBytesConfig(**options)
    label = quantization_label(config.to_dict())
    return StorageFormat(label, {"quantization_config": config}, packed=True, quantized_on_loading=True)


def _check_can_quantize(origin: ModelOrigin, entry: Mapping[str, Any]) -> None:
    if origin.gguf:
        raise UserError(f"{origin.name}: a GGUF file cannot be quantized on loading; leave --quantize out")
    if entry:
        method = quantization_method(entry)
        label = quantization_label(entry) if method == "bitsandbytes" else method
        raise UserError(f"{origin.name} is already quantized ({label}); leave --quantize out")
    _check_package(origin)


def _check_package(origin: ModelOrigin) -> None:
    if find_spec("bitsandbytes") is None:
        raise UserError(f"{origin.name} needs bitsandbytes; run pip install 'obliteratus[quantized]'")


def _refusal_message(origin: ModelOrigin, method: str) -> str:
    reason = REFUSED.get(method, "this format is unknown here")
    return (
        f"{origin.name}: its weights are quantized as {method or 'a format without a name'}, which is not supported: "
        f"{reason}. {SUPPORTED}; give the full-precision model, with --quantize 4bit if memory is short"
    )
