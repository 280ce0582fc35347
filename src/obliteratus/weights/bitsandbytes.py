"""Weights that bitsandbytes packed: as numbers [out, in], and back into the format that they had.

The only place that knows these formats. Packed bytes are never treated as numbers anywhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from obliteratus.core.errors import UnsupportedModelError
from obliteratus.core.shapes import Float
from obliteratus.weights.rounding import round_compensated

HOME = "bitsandbytes.nn.modules"  # looked for by name: importing it takes seconds, and most models need it not
Entries = dict[str, Tensor]
"""What a module saves of its weight, by name: codes, scales, formats."""


@dataclass(frozen=True)
class Format:
    """How one kind of parameter holds a matrix."""

    read: Callable[[Any], Tensor]
    """Module → W [out, in], in the dtype that the module computes with."""
    write: Callable[[Tensor, Any], tuple[Entries, Callable[[], Tensor]]]
    """(W fp32, module) → (what to save in the module's own format, what these entries are as numbers)."""
    rounded: Callable[[Tensor, Any], Tensor]
    """(rows [n, in], module) → what it would make of them, near enough to foresee its rounding."""
    codes: Callable[[Tensor], Tensor]
    """Stored weight → one number a code, flat: for comparing, not for computing."""
    near: float
    """Share of codes that may differ between one matrix quantised twice, from fp32 and from bf16: see `differing_codes`."""


def is_packed(module: nn.Module) -> bool:
    """Whether the module's weight is packed in a format that this module can read."""
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    return weight is not None and not weight.is_meta and _format(weight) is not None


def is_codes(parameter: Tensor) -> bool:
    """Whether the parameter belongs to bitsandbytes: its bytes are codes, even where it calls them bfloat16."""
    return type(parameter).__module__ == HOME


def unpacked_shape(parameter: Tensor) -> tuple[int, ...]:
    """The shape of the numbers that a parameter holds, packed or not."""
    state = vars(parameter).get("quant_state") if is_codes(parameter) else None
    return tuple(parameter.shape if state is None else state.shape)


def packed_matrix_shape(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a packed matrix."""
    rows, columns = unpacked_shape(module.get_parameter("weight"))
    return rows, columns


def dequantize(module: nn.Module) -> Float[Tensor, "out inp"]:
    """W of y = Wx + b, fp32: the numbers that the module itself multiplies with. UnsupportedModelError for a layout of
    which this module knows nothing."""
    return _of(module).read(module).float()


def requantize(
    weight: Float[Tensor, "out inp"], module: nn.Module, along: Float[Tensor, "k out"] | None = None
) -> tuple[Entries, Float[Tensor, "out inp"]]:
    """What the module would save had it held ``weight``, in its own format; and stored − weight, fp32.

    along: orthonormal rows along which the outputs must stay what they are, whatever rounding does elsewhere; see
    `round_compensated`. Where blocks of codes go on from row to row they stay so only by chance.
    """
    form, target = _of(module), weight.float()
    if along is not None and _by_rows(module):
        target = round_compensated(target, along.to(target), lambda rows: form.rounded(rows, module))
    entries, numbers = form.write(target, module)
    return entries, numbers().float().sub_(weight)


def differing_codes(weight: Float[Tensor, "out inp"], module: nn.Module) -> float:
    """Share of codes (0–1) that differ between ``weight`` quantised now and what the module stores."""
    form = _of(module)
    entries, _ = form.write(weight.float(), module)
    stored, now = form.codes(module.get_parameter("weight").data), form.codes(entries["weight"])
    return float((stored != now).float().mean()) if stored.shape == now.shape else 1.0


def same_matrix_limit(module: nn.Module) -> float:
    """The share of differing codes up to which two matrices are the same one, rounded differently before."""
    return _of(module).near


def keep_portable(model: nn.Module) -> None:
    """Keep bitsandbytes from rewriting weights in the machine's own layout at the first forward pass.

    On CPUs with AVX512-BF16 it would, and only approximately back on saving: unedited matrices would change.
    """
    for module in model.modules():
        if "support_avx512bf16_for_cpu" in vars(module):
            vars(module)["support_avx512bf16_for_cpu"] = False


# ------------------------------------------------------------------------------------------- formats
def _of(module: nn.Module) -> Format:
    form = _format(module.get_parameter("weight"))
    assert form is not None, "is_packed comes first"
    return form


def _format(weight: Tensor) -> Format | None:
    kind = type(weight)
    form = FORMATS.get(kind.__name__) if kind.__module__ == HOME else None
    # Int8Params can also hold plain fp16, and Params4bit what is still to be packed: neither is in its format.
    ready = weight.dtype == torch.int8 if kind.__name__ == "Int8Params" else vars(weight).get("quant_state") is not None
    return form if ready else None


def _state4(module: Any) -> Any:
    state = module.weight.quant_state
    if vars(state).get("packing_format_for_cpu", False):
        raise UnsupportedModelError(
            "the 4-bit weights are in bitsandbytes' AVX512-BF16 layout, which cannot be read back exactly; "
            "load the model with open_subject, which keeps them portable"
        )
    return state


def _read4(module: Any) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    weight: Tensor = dequantize_4bit(module.weight.data, _state4(module))
    return weight


def _write4(weight: Tensor, module: Any) -> tuple[Entries, Callable[[], Tensor]]:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    old = _state4(module)
    codes, state = quantize_4bit(
        weight.contiguous(),
        blocksize=old.blocksize,
        compress_statistics=old.nested,
        quant_type=old.quant_type,
        quant_storage=module.weight.dtype,
    )
    state.dtype = old.dtype  # what it is computed in; the codes come straight from fp32
    entries = {"weight": codes, **{f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}}
    return noted(entries), lambda: dequantize_4bit(codes, state)


NOTE = ".quant_state."  # JSON, as bytes
NOTED = 512  # bytes: bitsandbytes' own are some 100 to 200, longer or shorter by how a float is printed


def noted(entries: Mapping[str, Tensor]) -> Entries:
    """The entries with notes of a size that is known before they are made: JSON ignores blanks at its end."""
    pad = torch.nn.functional.pad
    return {n: pad(e, (0, NOTED - len(e)), value=ord(" ")) if NOTE in n else e for n, e in entries.items()}


def padded(state: Mapping[str, Tensor]) -> Entries:
    """What stands for the entries that are made in another size than they have now, on the meta device."""
    return {name: torch.empty(NOTED, dtype=torch.uint8, device="meta") for name in state if NOTE in name}


def _by_rows(module: Any) -> bool:
    """Whether rows are packed apart from each other."""
    state = vars(module.weight).get("quant_state")
    return state is None or packed_matrix_shape(module)[1] % int(state.blocksize) == 0


def _rounded4(rows: Tensor, module: Any) -> Tensor:
    state = _state4(module)
    blocks = rows.reshape(-1, state.blocksize)
    scale = blocks.abs().amax(1, keepdim=True).clamp(min=1e-30)  # a block of zeros stays one
    levels = state.code.to(rows).unique()  # sorted; fp4 has two zeros
    nearest = torch.bucketize(blocks / scale, (levels[1:] + levels[:-1]) / 2)
    rounded: Tensor = (levels[nearest] * scale).reshape(rows.shape)
    return rounded


def _codes4(stored: Tensor) -> Tensor:
    packed = stored.reshape(-1).view(torch.uint8)
    return torch.stack([packed >> 4, packed & 0xF], 1).flatten()


def _scales8(module: Any) -> Any:
    """SCB moves from the parameter to the module's state at the first forward pass."""
    scales = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
    if scales is None:
        raise UnsupportedModelError("8-bit weights without their scales (SCB); load the model again")
    return scales


def _read8(module: Any) -> Tensor:
    from bitsandbytes.functional import int8_vectorwise_dequant

    weight: Tensor = int8_vectorwise_dequant(module.weight.data, _scales8(module))
    return weight


def _write8(weight: Tensor, module: Any) -> tuple[Entries, Callable[[], Tensor]]:
    from bitsandbytes.functional import int8_vectorwise_dequant, int8_vectorwise_quant

    codes, scales, _ = int8_vectorwise_quant(weight.half().contiguous())  # its kernels take fp16 only
    row_major = torch.tensor(0, dtype=torch.uint8)  # the only order that bitsandbytes ≥ 0.45 writes
    entries = {"weight": codes, "SCB": scales, "weight_format": row_major}
    return entries, lambda: int8_vectorwise_dequant(codes, scales)


def _rounded8(rows: Tensor, module: Any) -> Tensor:
    scale = rows.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127  # int8 without −128
    return (rows / scale).round() * scale


# `same_matrix_limit`: bf16 moves a value by up to 2⁻⁹ of itself. Of 16 levels it then crosses an edge 3 times in 1 000, of 255 one
# time in ten or less; taking one direction out of a matrix 4 096 wide moves 4 % of 16 levels and 40 % of 255.
FORMATS: Mapping[str, Format] = {
    "Params4bit": Format(_read4, _write4, _rounded4, _codes4, near=0.01),
    "Int8Params": Format(_read8, _write8, _rounded8, torch.flatten, near=0.15),
}
