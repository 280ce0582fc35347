"""Which matrices of an architecture write into the residual stream, and which read from it.

`families.FAMILIES` is declared, never guessed from a shape; `selftest.self_test` proves it on a loaded model.
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
from obliteratus.summon.architectures import FAMILIES, UNSUPPORTED, Architecture, Branch, Matrix
from obliteratus.weights.bitsandbytes import is_packed
from obliteratus.weights.devices import local_part
from obliteratus.weights.matrices import fetch_parameter


# ------------------------------------------------------------------------------------- reading it
def architecture_of(config: PreTrainedConfig) -> Architecture:
    """The declaration for this configuration; UnsupportedModelError where there is none that fits."""
    name = config.model_type
    if name in UNSUPPORTED:
        raise UnsupportedModelError(f"'{name}' models are not supported: {UNSUPPORTED[name]}")
    if name not in FAMILIES:
        near = difflib.get_close_matches(name, FAMILIES, n=3) or sorted(FAMILIES)
        raise UnsupportedModelError(
            f"architecture '{name}' is not known (near: {', '.join(near)}): no entry in families.FAMILIES; "
            "add one that declares its blocks, embeddings, norms, writers and readers"
        )
    if reason := FAMILIES[name].refusal(config):
        raise UnsupportedModelError(f"this '{name}' model is not supported: {reason}")
    return FAMILIES[name]


def model_class_of(config: PreTrainedConfig) -> Any:
    """The class that opens such a model with its head: a text model, or one that sees, of which the text is edited."""
    sees = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
    return AutoModelForImageTextToText if sees else AutoModelForCausalLM


def find_sites(model: PreTrainedModel, family: Architecture) -> tuple[Site, ...]:
    """Every declared site: embeddings (layer −1), block by block, then the unembedding (layer L).

    UnsupportedModelError names the first module that is declared and not there.
    """
    sites = [Site(path, -1, "embed", "writes", "embedding") for path in family.embeds]
    for layer, block in enumerate(blocks_of(model, family)):
        sites += _block_sites(family, layer, block)
    norm = family.final_norm
    sites.append(Site(family.unembed, n_layers_of(model, family), "unembed", "reads", "linear", norm, family.norm))
    for site in sites:
        _check_site(model, site)
    return tuple(sites)


def n_layers_of(model: PreTrainedModel, family: Architecture) -> int:
    """How many decoder blocks the model has."""
    return len(blocks_of(model, family))


def blocks_of(model: PreTrainedModel, family: Architecture) -> list[nn.Module]:
    """The decoder blocks, in order."""
    return list(_module(model, family.layers).children())


def branches_of(family: Architecture, layer: int, block: nn.Module) -> tuple[Architecture | Branch, ...]:
    """What every block has, and which alternatives this one has. UnsupportedModelError where it has none of some."""
    names = {name for name, _ in chain(block.named_modules(), block.named_parameters())}
    found: list[Architecture | Branch] = [family]
    for choice in family.branches:
        here = [branch for branch in choice if not branch.at or branch.at in names]
        if not here:
            known = ", ".join(branch.at for branch in choice)
            raise UnsupportedModelError(
                f"{family.layers}.{layer} has none of {known}, of which it is declared to have one; mend {_TABLE}"
            )
        found.append(here[0])
    return tuple(found)


def _block_sites(family: Architecture, layer: int, block: nn.Module) -> list[Site]:
    """Writers, then readers."""
    there = branches_of(family, layer, block)
    made = ((r, list(_declared(family, f"{family.layers}.{layer}.", layer, b, r))) for r in _ROLES for b in there)
    return [site for _, sites in made for site in sites]


_ROLES: tuple[Role, Role] = ("writes", "reads")


def _declared(
    family: Architecture, prefix: str, layer: int, branch: Architecture | Branch, role: Role
) -> Iterator[Site]:
    writes = role == "writes"
    norms = branch.post_norm if writes else branch.pre_norm
    for part, m in _writing(branch) if writes else _reading(branch, family):
        gain = prefix + norms[part] if part in norms else None
        yield Site(prefix + m.path, layer, part, role, m.layout, gain, family.norm, weight=m.weight, bias=m.bias)


def _writing(branch: Architecture | Branch) -> Iterator[tuple[str, Matrix]]:
    return ((part, Matrix(*matrix)) for part, matrix in branch.writers.items())


def _reading(branch: Architecture | Branch, family: Architecture) -> Iterator[tuple[str, Matrix]]:
    for part, matrices in branch.readers.items():
        yield from ((part, Matrix(m, family.reader_layout) if isinstance(m, str) else m) for m in matrices)


def _check_site(model: PreTrainedModel, site: Site) -> None:
    if site.gain is not None:
        _module(model, site.gain)
    module = _module(model, site.path)
    if site.stacked:
        _check_stack(module, site)
        return
    stored: Layout = "linear"
    if isinstance(module, Conv1D):
        stored = "conv1d"
    elif isinstance(module, nn.Embedding):
        stored = "embedding"
    if stored != site.layout and not is_packed(module):  # packed matrices are [out, in], whatever they were
        raise UnsupportedModelError(f"{site.path} is declared as {site.layout} and is {stored}; mend {_TABLE}")


def _check_stack(module: nn.Module, site: Site) -> None:
    """Which way round the matrices lie is what transformers itself has marked the class with, for its kernels."""
    own = dict(module.named_parameters(recurse=False))
    if site.weight not in own or "is_transposed" not in vars(module):
        raise UnsupportedModelError(f"{site.path} is declared to hold a stack '{site.weight}'; mend {_TABLE}")
    if vars(module)["is_transposed"] != (site.layout == "stack_t"):
        raise UnsupportedModelError(f"{site.path} is declared as {site.layout}, and lies the other way; mend {_TABLE}")


_TABLE = "families.FAMILIES"


def _module(model: PreTrainedModel, path: str) -> nn.Module:
    try:
        module: nn.Module = model.get_submodule(path)
    except AttributeError as error:
        raise UnsupportedModelError(
            f"a '{model.config.model_type}' model is declared to have '{path}', and this one has not; "
            "mend its entry in families.FAMILIES, or try the transformers version that it was written for"
        ) from error
    return module


def has_heads(family: Architecture, site: Site) -> bool:
    """Whether this is what attention writes, head beside head; not what another mixer does in its place."""
    branches = (branch for choice in family.branches for branch in choice if not branch.heads)
    others = {Matrix(*branch.writers["attn.out"]).path for branch in branches}
    return site.part == "attn.out" and not any(site.path.endswith(f".{path}") for path in others)


def width_of(model: PreTrainedModel) -> int:
    """H, of the text model where there are others beside it."""
    return int(model.config.get_text_config().hidden_size)


def is_tied(model: PreTrainedModel) -> bool:
    """Whether embedding and unembedding share their storage, whatever the configuration says."""
    ends: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    table, head = (local_part(end.weight) for end in ends)
    if table.is_meta or head.is_meta:
        return table is head
    return bool(table.untyped_storage().data_ptr() == head.untyped_storage().data_ptr())


def tied_ends(model: PreTrainedModel) -> tuple[str, str] | None:
    """Parameter names of the input embedding and of the head, where they share their storage."""
    if not is_tied(model):
        return None
    table, head = end_paths(model)
    return f"{table}.weight", f"{head}.weight"


def end_paths(model: PreTrainedModel) -> tuple[str, str]:
    """Module paths of the input embedding and of the head."""
    paths = {id(module): path for path, module in model.named_modules()}
    return paths[id(model.get_input_embeddings())], paths[id(model.get_output_embeddings())]


def tied_in(subject: Subject) -> tuple[str, str] | None:
    """`tied_ends`, wherever the weights are."""
    return tied_ends(subject.model) if subject.offloaded is None else subject.offloaded.tied


def gain_of(subject: Subject, site: Site) -> Float[Tensor, " width"] | None:
    """γ, fp32: what the norm between this site and the stream multiplies by; None where nothing does."""
    return gain_in(subject.model, site)


def gain_in(model: PreTrainedModel, site: Site) -> Float[Tensor, " width"] | None:
    """`gain_of` for a bare model."""
    if site.gain is None:
        return None
    norm: Any = model.get_submodule(site.gain)
    if norm.weight is None:  # a LayerNorm without affine parameters
        return None
    gain = fetch_parameter(norm, "weight").detach().float()
    return 1.0 + gain if site.norm == "rms+1" else gain


def norm_bias_of(subject: Subject, site: Site) -> Float[Tensor, " width"] | None:
    """β, fp32: what the LayerNorm between this site and the stream adds; None where nothing does."""
    if site.gain is None:
        return None
    norm = subject.module(site.gain)
    own = dict(norm.named_parameters(recurse=False))
    return fetch_parameter(norm, "bias").detach().float() if "bias" in own else None
