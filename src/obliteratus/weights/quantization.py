"""How a model's weights are stored, as its configuration says: what is loaded packed, what as floats, what not at all.

Decided before any weight is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from transformers import BitsAndBytesConfig, FineGrainedFP8Config, PreTrainedConfig
from transformers.utils.quantization_config import Mxfp4Config, QuantizationMethod

from obliteratus.core.errors import UnsupportedModelError, UserError
from obliteratus.core.registry import unknown_name
from obliteratus.weights.sources import ModelOrigin

QUANTISE: Mapping[str, Mapping[str, Any]] = {
    "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},  # the better of the two 4-bit codes on every weight
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "8bit": {"load_in_8bit": True},
}
"""What ``quantise`` may be, and bitsandbytes' own options for it."""
SUPPORTED = "bitsandbytes in 4 and 8 bits, GGUF, and FP8, MXFP8 and MXFP4 (loaded as bfloat16) are supported"
NEEDS_KERNELS = "its packed weights are read by kernels of its own, and writing them again needs calibration data"
# Known to transformers and not to us, with the reason. All else is unknown even by name.
REFUSED: Mapping[str, str] = {
    "gptq": NEEDS_KERNELS,
    "awq": NEEDS_KERNELS,
    "auto-round": NEEDS_KERNELS,
    "compressed-tensors": "one name for many formats, none of which can be written again here",
    **dict.fromkeys(
        ("aqlm", "bitnet", "eetq", "fbgemm_fp8", "fouroversix", "fp_quant", "gemma", "higgs", "hqq"), NEEDS_KERNELS
    ),
    **dict.fromkeys(("metal", "nvfp4", "quanto", "quark", "sinq", "spqr", "torchao", "vptq"), NEEDS_KERNELS),
}
AS_FLOATS: Mapping[str, Any] = {"fp8": FineGrainedFP8Config, "mxfp8": FineGrainedFP8Config, "mxfp4": Mxfp4Config}
"""Stored in few bits, loaded as plain floats: transformers' own configuration for each."""


@dataclass(frozen=True)
class Storage:
    """What to tell transformers, and what to tell the user."""

    label: str = ""
    """``bitsandbytes nf4``, ``fp8`` …; empty for plain floats."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """For from_pretrained."""
    packed: bool = False
    """Whether weights stay packed in memory."""
    here: bool = False
    """Whether they are plain on disk, and quantised on loading."""


def choose_storage(
    origin: ModelOrigin,
    config: PreTrainedConfig,
    quantise: str | Mapping[str, Any] = "",
    dtype: torch.dtype | str = "auto",
) -> Storage:
    """How to load the model. UserError where it cannot be edited here, or cannot be quantised as asked."""
    mark = quantization_entry(config)
    if quantise:
        _check_can_quantise(origin, mark)
        return _on_loading(quantise, config if dtype == "auto" else dtype)
    if not mark or origin.gguf:  # GGUF files have a mark of their own, and are dequantised
        return Storage()
    method = quantization_method(mark)
    if method == "bitsandbytes":
        _check_package(origin)
        return Storage(quantization_label(mark), packed=True)
    if method in AS_FLOATS:
        return Storage(method, {"quantization_config": AS_FLOATS[method](dequantize=True)})
    raise UnsupportedModelError(_refusal(origin, method))


def quantization_entry(config: PreTrainedConfig) -> dict[str, Any]:
    """The configuration's own account of its quantisation; empty where there is none."""
    mark = vars(config).get("quantization_config")
    if mark is None:
        return {}
    return dict(mark) if isinstance(mark, Mapping) else dict(mark.to_dict())


def quantization_method(mark: Mapping[str, Any]) -> str:
    """``bitsandbytes``, ``gptq`` …, as files name it. Old bitsandbytes files give no method."""
    if mark.get("load_in_4bit") or mark.get("load_in_8bit"):
        return "bitsandbytes"
    method = mark.get("quant_method", "")
    return str(method.value if isinstance(method, QuantizationMethod) else method)


def quantization_label(mark: Mapping[str, Any]) -> str:
    """A bitsandbytes format in two words: ``bitsandbytes nf4``, ``bitsandbytes fp4``, ``bitsandbytes int8``."""
    kind = mark.get("bnb_4bit_quant_type", "fp4") if mark.get("load_in_4bit") else "int8"
    return f"bitsandbytes {kind}"


def _on_loading(quantise: str | Mapping[str, Any], dtype: Any) -> Storage:
    if isinstance(quantise, str) and quantise not in QUANTISE:
        raise UserError(unknown_name("--quantise", quantise, list(QUANTISE)))
    options = dict(QUANTISE[quantise] if isinstance(quantise, str) else quantise)
    kind = dtype.dtype if isinstance(dtype, PreTrainedConfig) else dtype
    options.setdefault("bnb_4bit_compute_dtype", torch.float32 if kind is None else kind)
    made = BitsAndBytesConfig(**options)
    return Storage(quantization_label(made.to_dict()), {"quantization_config": made}, packed=True, here=True)


def _check_can_quantise(origin: ModelOrigin, mark: Mapping[str, Any]) -> None:
    if origin.gguf:
        raise UserError(f"{origin.name}: a GGUF file cannot be quantised on loading; leave --quantise out")
    if mark:
        what = quantization_label(mark) if quantization_method(mark) == "bitsandbytes" else quantization_method(mark)
        raise UserError(f"{origin.name} is quantised already ({what}); leave --quantise out")
    _check_package(origin)


def _check_package(origin: ModelOrigin) -> None:
    if find_spec("bitsandbytes") is None:
        raise UserError(f"{origin.name}: needs bitsandbytes; pip install 'obliteratus[quantised]'")


def _refusal(origin: ModelOrigin, method: str) -> str:
    why = REFUSED.get(method, "a format of which nothing is known here")
    name = method or "a format without a name"
    return (
        f"{origin.name}: its weights are quantised as {name}, which is not supported: {why}. {SUPPORTED}; "
        "give the full-precision model, with --quantise 4bit where memory is short"
    )
