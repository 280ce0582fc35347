"""Finds, in a loaded model, the matrices that write into the residual stream and those that read from it.

The declarations come from `architectures.ARCHITECTURES`; `selftest.self_test` checks them on a loaded model.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from itertools import chain
from typing import Any

from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from obliteratus.core.errors import UnsupportedModelError
from obliteratus.core.shapes import Float
from obliteratus.core.types import Layout, Role, Site, Subject
from obliteratus.summon.architectures import ARCHITECTURES, UNSUPPORTED, Architecture, Branch, Matrix
from obliteratus.weights.bitsandbytes import is_packed
from obliteratus.weights.devices import local_shard
from obliteratus.weights.matrices import fetch_parameter

_TABLE = "summon/architectures.py"
_ROLES: tuple[Role, Role] = ("writes", "reads")


# ------------------------------------------------------------------------------------- the declaration
def find_architecture(config: PreTrainedConfig) -> Architecture:
    """Return the declaration of this configuration's architecture.

    Raises UnsupportedModelError if there is none, or if it does not cover this configuration.
    """
    name = config.model_type
    if name in UNSUPPORTED:
        raise UnsupportedModelError(f"'{name}' models are not supported: {UNSUPPORTED[name]}")
    if name not in ARCHITECTURES:
        near = difflib.get_close_matches(name, ARCHITECTURES, n=3) or sorted(ARCHITECTURES)
        raise UnsupportedModelError(
            f"architecture '{name}' is not known (near: {', '.join(near)}); add an entry for it to {_TABLE} that "
            "declares its blocks, embeddings, norms, writers and readers"
        )
    if reason := ARCHITECTURES[name].explain_refusal(config):
        raise UnsupportedModelError(f"this '{name}' model is not supported: {reason}")
    return ARCHITECTURES[name]


def choose_model_class(config: PreTrainedConfig) -> Any:
    """Return the auto class that loads the model with its head: a text model or an image-text model."""
    sees = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
    return AutoModelForImageTextToText if sees else AutoModelForCausalLM


# ------------------------------------------------------------------------------------- sites
def find_sites(model: PreTrainedModel, architecture: Architecture) -> tuple[Site, ...]:
    """Return all declared sites: embeddings (layer −1), then block by block, then the unembedding (layer L).

    Raises UnsupportedModelError that names the first declared module that the model lacks or stores otherwise.
    """
    sites = [Site(path, -1, "embed", "writes", "embedding") for path in architecture.embeds]
    blocks = list_blocks(model, architecture)
    for layer, block in enumerate(blocks):
        sites += _block_sites(architecture, layer, block)
    norm = architecture.final_norm
    sites.append(Site(architecture.unembed, len(blocks), "unembed", "reads", "linear", norm, architecture.norm))
    for site in sites:
        _check_site(model, site)
    return tuple(sites)


def list_blocks(model: PreTrainedModel, architecture: Architecture) -> list[nn.Module]:
    """Return the decoder blocks in order."""
    return list(_submodule(model, architecture.layers).children())


def choose_branches(architecture: Architecture, layer: int, block: nn.Module) -> tuple[Architecture | Branch, ...]:
    """Return the declarations that hold for one block: the architecture itself and one branch of each choice.

    Raises UnsupportedModelError if the block has none of a choice's branches.
    """
    names = {name for name, _ in chain(block.named_modules(), block.named_parameters())}
    chosen: list[Architecture | Branch] = [architecture]
    for choice in architecture.branches:
        present = [branch for branch in choice if not branch.marker or branch.marker in names]
        if not present:
            known = ", ".join(branch.marker for branch in choice)
            raise UnsupportedModelError(
                f"{architecture.layers}.{layer} must have one of {known} and has none; correct its entry in {_TABLE}"
            )
        chosen.append(present[0])
    return tuple(chosen)


def _block_sites(architecture: Architecture, layer: int, block: nn.Module) -> list[Site]:
    """Return the block's writers, then its readers."""
    branches = choose_branches(architecture, layer, block)
    return [s for role in _ROLES for b in branches for s in _declared_sites(architecture, layer, b, role)]


def _declared_sites(
    architecture: Architecture, layer: int, branch: Architecture | Branch, role: Role
) -> Iterator[Site]:
    prefix = f"{architecture.layers}.{layer}."
    writes = role == "writes"
    norms = branch.post_norm if writes else branch.pre_norm
    for part, m in _writers(branch) if writes else _readers(branch, architecture):
        gain = prefix + norms[part] if part in norms else None
        yield Site(prefix + m.path, layer, part, role, m.layout, gain, architecture.norm, weight=m.weight, bias=m.bias)


def _writers(branch: Architecture | Branch) -> Iterator[tuple[str, Matrix]]:
    return ((part, Matrix(*matrix)) for part, matrix in branch.writers.items())


def _readers(branch: Architecture | Branch, architecture: Architecture) -> Iterator[tuple[str, Matrix]]:
    for part, matrices in branch.readers.items():
        yield from ((part, Matrix(m, architecture.reader_layout) if isinstance(m, str) else m) for m in matrices)


def _check_site(model: PreTrainedModel, site: Site) -> None:
    if site.gain is not None:
        _submodule(model, site.gain)
    module = _submodule(model, site.path)
    if site.stacked:
        _check_stack(module, site)
        return
    stored: Layout = "linear"
    if isinstance(module, Conv1D):
        stored = "conv1d"
    elif isinstance(module, nn.Embedding):
        stored = "embedding"
    if stored != site.layout and not is_packed(module):  # packed matrices are always [out, in]
        raise UnsupportedModelError(
            f"{site.path} is declared as {site.layout} and is {stored}; correct its entry in {_TABLE}"
        )


def _check_stack(module: nn.Module, site: Site) -> None:
    """Compare the declared orientation with `is_transposed`, which transformers sets on the class for its kernels."""
    own = dict(module.named_parameters(recurse=False))
    if site.weight not in own or "is_transposed" not in vars(module):
        raise UnsupportedModelError(
            f"{site.path} is declared to hold a stack '{site.weight}' and does not; correct its entry in {_TABLE}"
        )
    if vars(module)["is_transposed"] != (site.layout == "stack_t"):
        raise UnsupportedModelError(
            f"{site.path} is declared as {site.layout} and is stored transposed; correct its entry in {_TABLE}"
        )


def _submodule(model: PreTrainedModel, path: str) -> nn.Module:
    try:
        module: nn.Module = model.get_submodule(path)
    except AttributeError as error:
        raise UnsupportedModelError(
            f"a '{model.config.model_type}' model is declared to have '{path}', and this one lacks it; "
            f"correct its entry in {_TABLE}, or use the transformers version that the entry was written for"
        ) from error
    return module


def has_heads(architecture: Architecture, site: Site) -> bool:
    """Return whether the site is an attention output, whose inputs are those of the heads side by side.

    The outputs of other mixers, such as state spaces, are not.
    """
    branches = (branch for choice in architecture.branches for branch in choice if not branch.heads)
    others = {Matrix(*branch.writers["attn.out"]).path for branch in branches}
    return site.part == "attn.out" and not any(site.path.endswith(f".{path}") for path in others)


# ------------------------------------------------------------------------------------- sizes, ends and norms
def stream_width(model: PreTrainedModel) -> int:
    """Return H, the width of the residual stream, of the text model where there are other models beside it."""
    return int(model.config.get_text_config().hidden_size)


def is_tied(model: PreTrainedModel) -> bool:
    """Return whether embedding and unembedding share their storage, whatever the configuration says."""
    ends: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    table, head = (local_shard(end.weight) for end in ends)
    if table.is_meta or head.is_meta:
        return table is head
    return bool(table.untyped_storage().data_ptr() == head.untyped_storage().data_ptr())


def find_tied_parameters(model: PreTrainedModel) -> tuple[str, str] | None:
    """Return the parameter names of embedding and head if they share their storage, else None."""
    if not is_tied(model):
        return None
    table, head = find_end_paths(model)
    return f"{table}.weight", f"{head}.weight"


def find_tied_ends(subject: Subject) -> tuple[str, str] | None:
    """Return `find_tied_parameters` of the subject's model, whether its weights are in memory or offloaded."""
    return find_tied_parameters(subject.model) if subject.offloaded is None else subject.offloaded.tied


def find_end_paths(model: PreTrainedModel) -> tuple[str, str]:
    """Return the module paths of the input embedding and of the head."""
    paths = {id(module): path for path, module in model.named_modules()}
    return paths[id(model.get_input_embeddings())], paths[id(model.get_output_embeddings())]


def read_gain(model: PreTrainedModel, site: Site) -> Float[Tensor, " width"] | None:
    """Return γ, fp32: the gain of the norm between the site and the stream; None if there is no norm or no gain."""
    if site.gain is None:
        return None
    norm: Any = model.get_submodule(site.gain)
    if norm.weight is None:  # a LayerNorm without affine parameters
        return None
    gain = fetch_parameter(norm, "weight").detach().float()
    return 1.0 + gain if site.norm == "rms+1" else gain


def read_norm_bias(subject: Subject, site: Site) -> Float[Tensor, " width"] | None:
    """Return β, fp32: the bias of the LayerNorm between the site and the stream; None if there is none."""
    if site.gain is None:
        return None
    norm = subject.module(site.gain)
    own = dict(norm.named_parameters(recurse=False))
    return fetch_parameter(norm, "bias").detach().float() if "bias" in own else None
