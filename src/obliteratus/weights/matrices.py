"""Reads stored weights of any layout as matrices [out, in], and converts matrices back. No other module does either."""

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
from obliteratus.weights.adapters import merged_module, plain_module
from obliteratus.weights.bitsandbytes import dequantize, is_codes, is_packed, packed_matrix_shape
from obliteratus.weights.devices import gather_tensor, is_sharded

SAMPLES = 64  # values of each writer in the digest: over all layers, more than two checkpoints share by chance
SMALLEST = 2.0**-14  # float16 is subnormal below this, so a bf16 checkpoint would get another digest in float16
PLAIN_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def read_weight(module: nn.Module, site: Site) -> Float[Tensor, "out inp"]:
    """Return the matrix W of y = Wx + b, fp32 (fp64 if stored so); of a stack, that of `site.expert`.

    For an embedding x is one-hot, so in = rows. The result is a view of the stored weight if its dtype allows: do not
    write into it. Weights packed by bitsandbytes are unpacked anew at each call. Raises UnsupportedModelError if the
    weight is neither a plain float matrix nor packed by bitsandbytes. Active adapters of PEFT are part of the matrix.
    """
    module = merged_module(module)
    if is_packed(module):  # [out, in] whatever the layout, because transformers transposes Conv1D before it packs
        return dequantize(module)
    _check_plain(module, site)
    weight = _select_expert(fetch_parameter(module, site.weight), site).detach()
    matrix = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return matrix if _is_out_in(site) else matrix.mT


def read_bias(module: nn.Module, site: Site) -> Float[Tensor, " out"] | None:
    """Return b of y = Wx + b, fp32 (fp64 if stored so), or None; of a stack, that of `site.expert`."""
    if not has_bias(module, site):
        return None
    bias = fetch_parameter(merged_module(module), site.bias).detach()
    return _select_expert(bias, site).to(torch.promote_types(bias.dtype, torch.float32))


def has_bias(module: nn.Module, site: Site) -> bool:
    """Return whether there is a bias; a stack has one for each expert."""
    return site.bias in dict(plain_module(module).named_parameters(recurse=False))


def count_inputs(module: nn.Module, site: Site) -> int:
    """Return how many inputs W has, which are the columns of `read_weight`."""
    return matrix_shape(module, site)[1]


def count_outputs(module: nn.Module, site: Site) -> int:
    """Return how many outputs W has, which are the rows of `read_weight`."""
    return matrix_shape(module, site)[0]


def matrix_shape(module: nn.Module, site: Site) -> tuple[int, int]:
    """Return (out, in), the shape of `read_weight`, without reading the weight."""
    module = plain_module(module)
    if is_packed(module):
        return packed_matrix_shape(module)
    first, second = _check_plain(module, site).shape[-2:]
    return (first, second) if _is_out_in(site) else (second, first)


def expand_experts(module: nn.Module, site: Site) -> list[Site]:
    """Return one site for each expert of a stack; for any other site, the site itself."""
    if not site.stacked or site.expert is not None:
        return [site]
    return [replace(site, expert=expert) for expert in range(len(_check_plain(module, site)))]


def stored_floats(module: nn.Module) -> dict[str, Tensor]:
    """Return the float tensors that the module itself stores, by name: parameters, and scales of packed ones."""
    stored = dict(module.named_parameters(recurse=False))
    if any(is_codes(parameter) for parameter in stored.values()):
        stored = {name: entry for name, entry in module.state_dict().items() if name != "weight"}
    return {name: tensor.detach() for name, tensor in stored.items() if tensor.is_floating_point()}


def convert_to_stored(weight: Float[Tensor, "out inp"], site: Site, like: Tensor) -> Tensor:
    """Return `weight` in the layout, dtype and device of the stored `like`. Raises ValueError for another shape."""
    matrix = weight if _is_out_in(site) else weight.mT
    if matrix.shape != like.shape:
        raise ValueError(f"{site.path} stores {tuple(like.shape)}, not {tuple(matrix.shape)}")
    return matrix.to(like.device, like.dtype).contiguous()


def _is_out_in(site: Site) -> bool:
    return site.layout in ("linear", "stack")


def _select_expert(tensor: Tensor, site: Site) -> Tensor:
    if not site.stacked:
        return tensor
    assert site.expert is not None, "a stack holds many matrices: call `expand_experts` first"
    return tensor[site.expert]


def sample_weight(stored: nn.Module | Tensor, name: str = "weight") -> list[Any]:
    """Return a few values of a stored weight for the digest, or a few codes and scales of a packed one.

    name: name of the weight in the module; a module without it is sampled at its first parameter or buffer.
    """
    stored = merged_module(stored) if isinstance(stored, nn.Module) else stored
    if isinstance(stored, nn.Module) and is_packed(stored):
        parts = {name: entry.detach().cpu().flatten() for name, entry in stored.state_dict().items()}
        parts["weight"] = parts["weight"].view(torch.uint8)  # the dtype of codes may be bfloat16
        return [_sample(part).tolist() for part in parts.values()]
    if isinstance(stored, nn.Module):
        tensors = dict(chain(stored.named_parameters(), stored.named_buffers()))
        stored = tensors.get(name, next(iter(tensors.values())))
    values = _sample(gather_tensor(stored).detach().flatten()).to("cpu", torch.bfloat16).float()
    return torch.where(values.abs() < SMALLEST, 0.0, values).tolist()


def _sample(flat: Tensor) -> Tensor:
    indices = sample_indices(len(flat))
    return flat[indices.start : indices.stop : indices.step]


def sample_indices(count: int) -> range:
    """Return the indices of the values that `sample_weight` takes of `count`."""
    return range(count)[:: max(count // SAMPLES, 1)][:SAMPLES]


def drop_quantization_config(model: Any) -> None:
    """Remove the quantization entry of a model whose weights were dequantized: with it transformers refuses to save."""
    model.is_quantized = False
    for owner, name in (
        (model.config, "quantization_config"),
        (model, "hf_quantizer"),
        (model, "quantization_method"),
    ):
        if name in vars(owner):
            delattr(owner, name)


def fetch_parameter(module: nn.Module, name: str) -> Tensor:
    """Return a whole parameter of the module, read from where accelerate keeps it, or gathered from all processes if it
    is sharded, which must all call this."""
    parameter = module.get_parameter(name)
    if not (parameter.is_meta and has_offloaded_params(module)):
        return gather_tensor(parameter)
    hook: Any = module._hf_hook
    loaded: Tensor = hook.weights_map[name]
    return loaded.to(parameter.dtype)


def execution_device(module: nn.Module) -> torch.device:
    """Return the device that the module computes on."""
    device = next(module.parameters()).device
    offloaded = device.type == "meta" and has_offloaded_params(module)
    hook: Any = module._hf_hook if offloaded else None
    return torch.device(hook.execution_device) if offloaded else device


def _check_plain(module: nn.Module, site: Site) -> nn.Parameter:
    """Return the parameter that holds the matrix, which may be a meta tensor. Raises UnsupportedModelError if it is not
    a plain float matrix."""
    parameters = dict(module.named_parameters(recurse=False))
    if site.weight not in parameters:
        raise UnsupportedModelError(
            f"{site.path} ({type(module).__name__}) has no parameter '{site.weight}'; {_REMEDY}"
        )
    weight = parameters[site.weight]
    class_name = type(weight).__name__
    own_class = type(weight) is nn.Parameter or is_sharded(weight)
    plain = own_class and weight.dtype in PLAIN_DTYPES and weight.ndim == (3 if site.stacked else 2)
    missing = weight.is_meta and not has_offloaded_params(module)
    if not plain or missing:
        storage = "not in memory" if missing else str(weight.dtype).removeprefix("torch.")
        shape = "×".join(map(str, weight.shape))
        raise UnsupportedModelError(
            f"{site.path} stores a {class_name} [{shape}], {storage}, which is not a plain float matrix; {_REMEDY}"
        )
    return weight


_REMEDY = "load the model without quantization, e.g. with dtype='bfloat16'"
