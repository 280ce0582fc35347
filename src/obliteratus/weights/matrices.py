"""The only reader and writer of stored weights: every layout becomes [out, in] here, and goes back here."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from accelerate.utils import has_offloaded_params
from torch import Tensor, nn

from obliteratus.core.errors import UnsupportedModelError
from obliteratus.core.shapes import Float
from obliteratus.core.types import Site
from obliteratus.weights.bitsandbytes import dequantize, is_codes, is_packed, packed_matrix_shape
from obliteratus.weights.devices import gather_tensor, is_parted

SAMPLE = 64  # values of each writer in the digest: over all layers, more than two checkpoints share by chance
SMALLEST = 2.0**-14  # float16 is subnormal below: a bf16 checkpoint would digest differently there
PLAIN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def read_weight(module: nn.Module, site: Site) -> Float[Tensor, "out inp"]:
    """The matrix W of y = Wx + b, fp32 (fp64 where stored so). For an embedding x is one-hot: in = rows. Of a stack,
    that of `site.expert`.

    A view of the stored weight where its dtype allows: do not write into it. UnsupportedModelError where the
    weight is neither a plain floating matrix nor packed by bitsandbytes, which is unpacked anew at each call.
    """
    if is_packed(module):  # [out, in] whatever the layout: transformers turns Conv1D before it packs
        return dequantize(module)
    _check_plain(module, site)
    weight = _one(fetch_parameter(module, site.weight), site).detach()
    matrix = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return matrix if _upright(site) else matrix.mT


def read_bias(module: nn.Module, site: Site) -> Float[Tensor, " out"] | None:
    """b of y = Wx + b, fp32 (fp64 where stored so); None where there is none. Of a stack, that of `site.expert`."""
    if not has_bias(module, site):
        return None
    bias = fetch_parameter(module, site.bias).detach()
    return _one(bias, site).to(torch.promote_types(bias.dtype, torch.float32))


def has_bias(module: nn.Module, site: Site) -> bool:
    """Whether there is a b, of a stack one for each expert."""
    return site.bias in dict(module.named_parameters(recurse=False))


def count_inputs(module: nn.Module, site: Site) -> int:
    """How many inputs W has: its columns as `read_weight` gives it."""
    return matrix_shape(module, site)[1]


def count_outputs(module: nn.Module, site: Site) -> int:
    """How many outputs W has."""
    return matrix_shape(module, site)[0]


def matrix_shape(module: nn.Module, site: Site) -> tuple[int, int]:
    """(out, in): the shape of what `read_weight` gives, without reading it."""
    if is_packed(module):
        return packed_matrix_shape(module)
    first, second = _check_plain(module, site).shape[-2:]
    return (first, second) if _upright(site) else (second, first)


def each_expert(module: nn.Module, site: Site) -> list[Site]:
    """The site itself; of a stack, one for each of its experts."""
    if not site.stacked or site.expert is not None:
        return [site]
    return [replace(site, expert=expert) for expert in range(len(_check_plain(module, site)))]


def stored_floats(module: nn.Module) -> dict[str, Tensor]:
    """What the module itself stores as floating numbers, by name: parameters, and of packed ones their scales."""
    own = dict(module.named_parameters(recurse=False))
    if any(is_codes(parameter) for parameter in own.values()):
        own = {name: entry for name, entry in module.state_dict().items() if name != "weight"}
    return {name: tensor.detach() for name, tensor in own.items() if tensor.is_floating_point()}


def to_stored(weight: Float[Tensor, "out inp"], site: Site, like: Tensor) -> Tensor:
    """`weight` in the layout, dtype and device of `like`, the stored matrix. ValueError on another shape."""
    matrix = weight if _upright(site) else weight.mT
    if matrix.shape != like.shape:
        raise ValueError(f"{site.path} stores {tuple(like.shape)}, not {tuple(matrix.shape)}")
    return matrix.to(like.device, like.dtype).contiguous()


def _upright(site: Site) -> bool:
    return site.layout in ("linear", "stack")


def _one(tensor: Tensor, site: Site) -> Tensor:
    """The expert's own part, a view."""
    if not site.stacked:
        return tensor
    assert site.expert is not None, "a stack has no one matrix: see `each_expert`"
    return tensor[site.expert]


def sample_weight(stored: nn.Module | Tensor, name: str = "weight") -> list[Any]:
    """What tells a stored weight from others: some of its values, or some codes and some scales of a packed one.

    name: the weight's own in the module; a module that has none of it is told by its first parameter or buffer.
    """
    if isinstance(stored, nn.Module) and is_packed(stored):
        parts = {name: entry.detach().cpu().flatten() for name, entry in stored.state_dict().items()}
        parts["weight"] = parts["weight"].view(torch.uint8)  # they may call themselves bfloat16
        return [_spread(part).tolist() for part in parts.values()]
    if isinstance(stored, nn.Module):
        own = dict(chain(stored.named_parameters(), stored.named_buffers()))
        stored = own.get(name, next(iter(own.values())))
    values = _spread(gather_tensor(stored).detach().flatten()).to("cpu", torch.bfloat16).float()
    return torch.where(values.abs() < SMALLEST, 0.0, values).tolist()


def _spread(flat: Tensor) -> Tensor:
    at = sample_places(len(flat))
    return flat[at.start : at.stop : at.step]


def sample_places(count: int) -> range:
    """Which of so many values `sample_weight` looks at."""
    return range(count)[:: max(count // SAMPLE, 1)][:SAMPLE]


def drop_quantization_mark(model: Any) -> None:
    """Forget that a file was quantised: its weights are plain floats now, yet with the mark transformers
    refuses to save them."""
    model.is_quantized = False
    for owner, name in (
        (model.config, "quantization_config"),
        (model, "hf_quantizer"),
        (model, "quantization_method"),
    ):
        if name in vars(owner):
            delattr(owner, name)


def fetch_parameter(module: nn.Module, name: str) -> Tensor:
    """A parameter of the module; where accelerate keeps it elsewhere, read from there; where it is parted among
    processes, brought together from all of them, which must all ask."""
    parameter = module.get_parameter(name)
    if not (parameter.is_meta and has_offloaded_params(module)):
        return gather_tensor(parameter)
    hook: Any = module._hf_hook
    found: Tensor = hook.weights_map[name]
    return found.to(parameter.dtype)


def device_of(module: nn.Module) -> torch.device:
    """Where the module computes."""
    device = next(module.parameters()).device
    away = device.type == "meta" and has_offloaded_params(module)
    hook: Any = module._hf_hook if away else None
    return torch.device(hook.execution_device) if away else device


def _check_plain(module: nn.Module, site: Site) -> nn.Parameter:
    """The parameter that holds the matrix, numbers or not."""
    own = dict(module.named_parameters(recurse=False))
    if site.weight not in own:
        raise UnsupportedModelError(
            f"{site.path} ({type(module).__name__}) has no parameter '{site.weight}'; {_REMEDY}"
        )
    weight = own[site.weight]
    kind = type(weight).__name__
    ours = type(weight) is nn.Parameter or is_parted(weight)
    plain = ours and weight.dtype in PLAIN and weight.ndim == (3 if site.stacked else 2)
    lost = weight.is_meta and not has_offloaded_params(module)
    if not plain or lost:
        where = "not in memory" if lost else str(weight.dtype).removeprefix("torch.")
        shape = "×".join(map(str, weight.shape))
        raise UnsupportedModelError(
            f"{site.path} stores a {kind} [{shape}], {where}: not a plain float matrix; {_REMEDY}"
        )
    return weight


_REMEDY = "load the model unquantised, e.g. with dtype='bfloat16'"
