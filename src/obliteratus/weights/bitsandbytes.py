"""Reads weights that bitsandbytes packed as numbers [out, in], and packs numbers in the same format.

No other module knows these formats, and packed bytes are never treated as numbers anywhere else.
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

MODULE = "bitsandbytes.nn.modules"  # compared by name, because importing it takes seconds and few models need it
Entries = dict[str, Tensor]
"""The state-dict entries of a module's weight by name: codes, scales and format notes."""


@dataclass(frozen=True)
class PackedFormat:
    """How one parameter class of bitsandbytes holds a matrix."""

    read: Callable[[Any], Tensor]
    """Module → W [out, in], in the dtype that the module computes with."""
    write: Callable[[Tensor, Any], tuple[Entries, Callable[[], Tensor]]]
    """(W fp32, module) → (entries in the module's own format, a function that returns them as numbers)."""
    round_rows: Callable[[Tensor, Any], Tensor]
    """(rows [n, in], module) → the rows about as the format would store them."""
    unpack_codes: Callable[[Tensor], Tensor]
    """Stored weight → its codes, flat, one number each: for comparison, not for computation."""
    max_differing_codes: float
    """Share of codes that may differ between one matrix quantized from fp32 and from bf16; see `differing_codes`."""


def is_packed(module: nn.Module) -> bool:
    """Return whether the module's weight is packed in a format that can be read here."""
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    return weight is not None and not weight.is_meta and _find_format(weight) is not None


def is_codes(parameter: Tensor) -> bool:
    """Return whether the parameter is bitsandbytes' own, so that its bytes are codes even if its dtype is bfloat16."""
    return type(parameter).__module__ == MODULE


def unpacked_shape(parameter: Tensor) -> tuple[int, ...]:
    """Return the shape of the numbers that a parameter holds, packed or not."""
    state = vars(parameter).get("quant_state") if is_codes(parameter) else None
    return tuple(parameter.shape if state is None else state.shape)


def packed_matrix_shape(module: nn.Module) -> tuple[int, int]:
    """Return (out, in) of a packed matrix."""
    rows, columns = unpacked_shape(module.get_parameter("weight"))
    return rows, columns


def dequantize(module: nn.Module) -> Float[Tensor, "out inp"]:
    """Return W of y = Wx + b, fp32: the numbers that the module itself multiplies with.

    Raises UnsupportedModelError for a memory layout that cannot be read exactly.
    """
    return _get_format(module).read(module).float()


def requantize(
    weight: Float[Tensor, "out inp"], module: nn.Module, along: Float[Tensor, "k out"] | None = None
) -> tuple[Entries, Float[Tensor, "out inp"]]:
    """Return the entries that the module would save if it held ``weight``, and stored − weight, fp32.

    along: orthonormal rows along which the outputs must survive rounding, see `round_compensated`. Where blocks of
    codes run across rows, this cannot be ensured.
    """
    form, target = _get_format(module), weight.float()
    if along is not None and _packs_rows_separately(module):
        target = round_compensated(target, along.to(target), lambda rows: form.round_rows(rows, module))
    entries, numbers = form.write(target, module)
    return entries, numbers().float().sub_(weight)


def differing_codes(weight: Float[Tensor, "out inp"], module: nn.Module) -> float:
    """Return the share of codes (0–1) in which ``weight``, quantized now, differs from what the module stores."""
    form = _get_format(module)
    entries, _ = form.write(weight.float(), module)
    stored, now = form.unpack_codes(module.get_parameter("weight").data), form.unpack_codes(entries["weight"])
    return float((stored != now).float().mean()) if stored.shape == now.shape else 1.0


def same_matrix_limit(module: nn.Module) -> float:
    """Return the largest share of differing codes (0–1) at which two matrices are one that was rounded differently."""
    return _get_format(module).max_differing_codes


def keep_portable_layout(model: nn.Module) -> None:
    """Keep bitsandbytes from converting weights to the machine's own layout at the first forward pass.

    On CPUs with AVX512-BF16 it would, and it converts them back only approximately on saving, which would change
    matrices that were not edited.
    """
    for module in model.modules():
        if "support_avx512bf16_for_cpu" in vars(module):
            vars(module)["support_avx512bf16_for_cpu"] = False


# ------------------------------------------------------------------------------------------- formats
def _get_format(module: nn.Module) -> PackedFormat:
    form = _find_format(module.get_parameter("weight"))
    assert form is not None, "the caller must check is_packed first"
    return form


def _find_format(weight: Tensor) -> PackedFormat | None:
    kind = type(weight)
    form = FORMATS.get(kind.__name__) if kind.__module__ == MODULE else None
    # Int8Params can also hold plain fp16, and Params4bit a matrix that is yet to be packed.
    packed = (
        weight.dtype == torch.int8 if kind.__name__ == "Int8Params" else vars(weight).get("quant_state") is not None
    )
    return form if packed else None


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
    state.dtype = old.dtype  # the dtype of the computation; the codes were made from fp32
    entries = {"weight": codes, **{f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}}
    return pad_notes(entries), lambda: dequantize_4bit(codes, state)


NOTE = ".quant_state."  # in the names of entries that hold JSON as bytes
NOTE_BYTES = 512  # bitsandbytes' own notes take 100 to 200 bytes, depending on how a float is printed


def pad_notes(entries: Mapping[str, Tensor]) -> Entries:
    """Return the entries with every note padded to `NOTE_BYTES`, so that file sizes are known before packing.

    JSON ignores the blanks at its end.
    """
    pad = torch.nn.functional.pad
    return {n: pad(e, (0, NOTE_BYTES - len(e)), value=ord(" ")) if NOTE in n else e for n, e in entries.items()}


def padded_note_shapes(state: Mapping[str, Tensor]) -> Entries:
    """Return meta tensors of the padded size for the notes in a state dict."""
    return {name: torch.empty(NOTE_BYTES, dtype=torch.uint8, device="meta") for name in state if NOTE in name}


def _packs_rows_separately(module: Any) -> bool:
    state = vars(module.weight).get("quant_state")
    return state is None or packed_matrix_shape(module)[1] % int(state.blocksize) == 0


def _round_rows4(rows: Tensor, module: Any) -> Tensor:
    state = _state4(module)
    blocks = rows.reshape(-1, state.blocksize)
    scale = blocks.abs().amax(1, keepdim=True).clamp(min=1e-30)  # keeps a block of zeros at zero
    levels = state.code.to(rows).unique()  # sorted; fp4 has two zeros
    nearest = torch.bucketize(blocks / scale, (levels[1:] + levels[:-1]) / 2)
    rounded: Tensor = (levels[nearest] * scale).reshape(rows.shape)
    return rounded


def _unpack_codes4(stored: Tensor) -> Tensor:
    packed = stored.reshape(-1).view(torch.uint8)
    return torch.stack([packed >> 4, packed & 0xF], 1).flatten()


def _scales8(module: Any) -> Any:
    """Return SCB, which moves from the parameter to the module's state at the first forward pass."""
    scales = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
    if scales is None:
        raise UnsupportedModelError("the 8-bit weights have no scales (SCB); load the model again")
    return scales


def _read8(module: Any) -> Tensor:
    from bitsandbytes.functional import int8_vectorwise_dequant

    weight: Tensor = int8_vectorwise_dequant(module.weight.data, _scales8(module))
    return weight


def _write8(weight: Tensor, module: Any) -> tuple[Entries, Callable[[], Tensor]]:
    from bitsandbytes.functional import int8_vectorwise_dequant, int8_vectorwise_quant

    codes, scales, _ = int8_vectorwise_quant(weight.half().contiguous())  # the kernels take fp16 only
    row_major = torch.tensor(0, dtype=torch.uint8)  # the only order that bitsandbytes ≥ 0.45 writes
    entries = {"weight": codes, "SCB": scales, "weight_format": row_major}
    return entries, lambda: int8_vectorwise_dequant(codes, scales)


def _round_rows8(rows: Tensor, module: Any) -> Tensor:
    scale = rows.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127  # int8 without −128
    return (rows / scale).round() * scale


# Reasons for max_differing_codes: bf16 moves a value by up to 2⁻⁹ of itself. With 16 levels its code then changes 3
# times in 1 000, with 255 levels one time in ten or less. Removing one direction from a matrix 4 096 wide changes 4 %
# of the codes with 16 levels and 40 % with 255.
FORMATS: Mapping[str, PackedFormat] = {
    "Params4bit": PackedFormat(_read4, _write4, _round_rows4, _unpack_codes4, max_differing_codes=0.01),
    "Int8Params": PackedFormat(_read8, _write8, _round_rows8, torch.flatten, max_differing_codes=0.15),
}
