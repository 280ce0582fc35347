"""Whether a GGUF file is one of the model that a plan was made for, and can hold the plan. Nothing is written here."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as T
from torch import Tensor

from obliteratus.core.errors import UnsupportedModelError, UserError
from obliteratus.core.types import Change, Edit, Plan, Shift, Site
from obliteratus.excise.bake.gguf_names import TABLE, GgufModel
from obliteratus.excise.change import needs_bias
from obliteratus.summon.model_samples import ModelSamples
from obliteratus.weights.gguf_blocks import bits_of, can_read, decode
from obliteratus.weights.gguf_io import GgufTensor
from obliteratus.weights.matrices import SMALLEST, sample_indices

# Largest relative distance between a model's weights and a file of it, by the bits of a number: about 1.4 times what
# types lose on SmolLM2-135M (Q8_0 0.56 %, Q5_0 4.5 %, Q4_0 8.8 %), and more below, where importance matrices shift the
# loss. Samples are rounded to bfloat16, which is 0.1 %. The organism and its base, a close pair, differ by 0.7 %.
LIMITS = ((9.0, 0.002), (8.0, 0.008), (6.0, 0.035), (5.0, 0.07), (4.0, 0.13), (3.0, 0.3), (0.0, 0.7))
SAME_TOKENS = 0.9  # share: converters rename a few special tokens, and another tokenizer shares few at the same place


def check_gguf_fits(model: GgufModel, plan: Plan, samples: ModelSamples, biases: bool = True) -> None:
    """Raise UserError unless the file is of the plan's model, and can hold all that the plan changes.

    biases: whether a bias that a change needs must have a place in the file.
    """
    model.check_kind()
    _check_vocabulary(model, samples)
    sites = {change.site.parameter: change.site for change in plan.edits}
    if (last := max((site.layer for site in sites.values() if site.part != "unembed"), default=0)) >= model.n_layers:
        raise UserError(_other_model(model, f"it has {model.n_layers} blocks, and the plan edits block {last}"))
    for site in sites.values():
        for tensor in model.find_tensors(site):
            _check_type(model, tensor)
    for change in plan.edits:
        _check_change(model, change, biases)
    check_same_weights(model, samples)
    edited = {site.part for site in sites.values()} & {"embed", "unembed"}
    if edited and model.tied and not model.may_untie():
        raise UserError(
            f"{model.file.path}: the plan edits one of embedding and head, which are one matrix in every "
            f"'{model.file.architecture}' file; take {min(edited)} out of excise.parts"
        )


def _check_vocabulary(model: GgufModel, samples: ModelSamples) -> None:
    path, table = model.file.path, model.file.tensors.get(TABLE)
    if not samples.weights:
        raise UserError(
            "the plan holds no samples of its model's weights, so no GGUF file can be checked against it; save it "
            "again with obliteratus apply PLAN MODEL --save plan"
        )
    if table is None:
        raise UserError(f"{path} has no {TABLE}, so it is no language model; give the model's GGUF file")
    if table.shape[0] != samples.rows:
        raise UserError(
            f"{path} has a vocabulary of {table.shape[0]} tokens, and the plan's model one of {samples.rows}; give "
            "a GGUF file of the model that the plan was made for"
        )
    _check_tokens(model, samples)


def _check_tokens(model: GgufModel, samples: ModelSamples) -> None:
    tokens = model.file.value("tokenizer.ggml.tokens", [])
    same = [number < len(tokens) and tokens[number] == token for number, token in samples.tokens.items()]
    if tokens and sum(same) < SAME_TOKENS * len(same):
        raise UserError(
            f"{model.file.path} has another vocabulary: {same.count(False)} of {len(same)} tokens differ from "
            "those of the plan's model; give a GGUF file of the model that the plan was made for"
        )


def _check_type(model: GgufModel, tensor: GgufTensor) -> None:
    if not can_read(tensor.type):
        raise UnsupportedModelError(
            f"{model.file.path}: {tensor.name} is stored as {tensor.type.name}, which the gguf package cannot read; "
            "give a file in another type, such as Q8_0 or Q4_K_M"
        )


def _check_change(model: GgufModel, change: Change, biases: bool) -> None:
    site, tensor = change.site, model.find_tensors(change.site)[0]
    out, inputs = tensor.shape[-2:] if site.layout != "embedding" else tensor.shape[::-1]
    if isinstance(change, Edit | Shift):
        width = (change.basis if isinstance(change, Edit) else change.vector).shape[-1]
        expected = inputs if isinstance(change, Edit) and site.role == "reads" else out
        if width != expected:
            raise UserError(
                f"{model.file.path}: {tensor.name} is {out}×{inputs}, and the plan's directions have {width} numbers; "
                "give a GGUF file of the model that the plan was made for"
            )
    if biases and needs_bias(change) and not model.may_have_bias(site):
        what, option = ("steering", "steer=0") if isinstance(change, Shift) else ("an anchored edit", "anchored=false")
        raise UserError(
            f"{what} needs a bias, and llama.cpp's '{model.file.architecture}' graph has none at "
            f"{model.find_bias(site)}; make the plan with --set excise.{option}, or run it live with chat --plan"
        )


# -------------------------------------------------------------------------------------------- weights
def check_same_weights(model: GgufModel, samples: ModelSamples) -> None:
    """Raise UserError unless all samples that the file has a tensor for agree with it as far as its types allow."""
    error = size = allowed = 0.0
    for name, known in samples.weights.items():
        path, _, weight = name.rpartition(".")
        site = Site(path, 0, "", "writes", samples.layouts[name], weight=weight)
        tensor = model.find_tensor(site)
        if tensor is None:  # the plan edits none of these, which was checked before
            continue
        stored = read_samples(model, tensor, site)
        if len(stored) != len(known):
            raise UserError(_other_model(model, f"{tensor.name} has another size"))
        square = float(known.square().sum())
        error, size = error + float((stored - known).square().sum()), size + square
        allowed += square * limit_of(tensor.type) ** 2
    if error > allowed or not size:
        found, most = (value**0.5 / max(size, 1e-30) ** 0.5 for value in (error, allowed))
        raise UserError(_other_model(model, f"its weights differ from the plan's by {found:.1%} ({most:.1%} allowed)"))


def _other_model(model: GgufModel, difference: str) -> str:
    return f"{model.file.path} is of another model: {difference}; give a GGUF file of the plan's model"


def limit_of(kind: T) -> float:
    """Return the largest relative distance that a type's rounding explains."""
    return next(limit for bits, limit in LIMITS if bits_of(kind) >= bits)


def read_samples(model: GgufModel, tensor: GgufTensor, site: Site) -> Tensor:
    """Return the numbers at the places that `sample_weight` takes of a site's parameter, rounded as it does."""
    places = list(_stored_places(tensor.shape, site))
    values = torch.stack([_read_number(model, tensor, row, column) for row, column in places]).bfloat16().float()
    return torch.where(values.abs() < SMALLEST, 0.0, values)


def _stored_places(shape: tuple[int, ...], site: Site) -> Iterator[tuple[int, int]]:
    """Yield row (counted through all matrices) and column of each sample, which counts along transformers' layout."""
    rows, columns = shape[-2:]
    turned = site.layout in ("conv1d", "stack_t")
    for index in sample_indices(prod(shape)):
        matrix, inside = divmod(index, rows * columns)
        column, row = divmod(inside, rows) if turned else divmod(inside, columns)[::-1]
        yield matrix * rows + row, column


def _read_number(model: GgufModel, tensor: GgufTensor, row: int, column: int) -> Tensor:
    block, size = GGML_QUANT_SIZES[tensor.type]
    values = decode(model.file.read_bytes(tensor, row, column // block * size, size), tensor.type)
    return values[0, column % block]
