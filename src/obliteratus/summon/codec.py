"""The only reader and writer of stored weights: every layout becomes [out, in] here, and goes back here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from obliteratus.errors import UnsupportedModelError
from obliteratus.shapes import Float
from obliteratus.types import Site

PLAIN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def read_weight(module: nn.Module, site: Site) -> Float[Tensor, "out inp"]:
    """The matrix W of y = Wx + b, fp32 (fp64 where stored so). For an embedding x is one-hot: in = rows. Of a stack,
    that of `site.expert`.

    A view of the stored weight where its dtype allows: do not write into it. UnsupportedModelError where the
    weight is not a plain floating matrix.
    """
    weight = _one(_plain(module, site), site).detach()
    matrix = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return matrix if _upright(site) else matrix.mT


def read_bias(module: nn.Module, site: Site) -> Float[Tensor, " out"] | None:
    """b of y = Wx + b, fp32 (fp64 where stored so); None where there is none. Of a stack, that of `site.expert`."""
    bias = dict(module.named_parameters(recurse=False)).get(site.bias)
    return None if bias is None else _one(bias.detach(), site).to(torch.promote_types(bias.dtype, torch.float32))


def has_bias(module: nn.Module, site: Site) -> bool:
    """Whether there is a b, of a stack one for each expert."""
    return site.bias in dict(module.named_parameters(recurse=False))


def columns(module: nn.Module, site: Site) -> int:
    """How many inputs W has: its columns as `read_weight` gives it."""
    return _plain(module, site).shape[-1 if _upright(site) else -2]


def rows(module: nn.Module, site: Site) -> int:
    """How many outputs W has."""
    return _plain(module, site).shape[-2 if _upright(site) else -1]


def each(module: nn.Module, site: Site) -> list[Site]:
    """The site itself; of a stack, one for each of its experts."""
    if not site.stacked or site.expert is not None:
        return [site]
    return [replace(site, expert=expert) for expert in range(len(_plain(module, site)))]


def stored(weight: Float[Tensor, "out inp"], site: Site, like: Tensor) -> Tensor:
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
    assert site.expert is not None, "a stack has no one matrix: see `each`"
    return tensor[site.expert]


def drop_quantisation_mark(model: Any) -> None:
    """Forget that a GGUF file was quantised: its weights are plain floats now, yet with the mark
    transformers refuses to save them."""
    model.is_quantized = False
    for owner, name in (
        (model.config, "quantization_config"),
        (model, "hf_quantizer"),
        (model, "quantization_method"),
    ):
        if name in vars(owner):
            delattr(owner, name)


def _plain(module: nn.Module, site: Site) -> Tensor:
    own = dict(module.named_parameters(recurse=False))
    if site.weight not in own:
        raise UnsupportedModelError(
            f"{site.path} ({type(module).__name__}) has no parameter '{site.weight}'; {_REMEDY}"
        )
    weight = own[site.weight]
    kind = type(weight).__name__
    plain = type(weight) is nn.Parameter and weight.dtype in PLAIN and weight.ndim == (3 if site.stacked else 2)
    if not plain or weight.is_meta:
        where = "not in memory" if weight.is_meta else str(weight.dtype).removeprefix("torch.")
        shape = "×".join(map(str, weight.shape))
        raise UnsupportedModelError(
            f"{site.path} stores a {kind} [{shape}], {where}: not a plain float matrix; {_REMEDY}"
        )
    return weight


_REMEDY = "load the model unquantised, e.g. with dtype='bfloat16'"
