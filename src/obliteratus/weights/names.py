"""Finds the tensors in a checkpoint's files that make up each parameter of the model.

The names go through transformers' own renamings and conversions, so whatever transformers can load, such as experts
stored one by one and stacked in memory, is found under its stored name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from types import SimpleNamespace
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from obliteratus.weights.bitsandbytes import is_codes

Shape = Sequence[int]
PACKING = "transformers.integrations"  # where quantizers keep their conversions, which no saved model undoes


@dataclass(frozen=True)
class StoredTensors:
    """Names of the stored tensors that make up one parameter."""

    key: str = ""
    """The tensor that is the parameter; '' if the parameter is stored in parts."""
    experts: tuple[tuple[str, ...], ...] = ()
    """For each matrix of a stack, the tensors that are joined along its outputs, in order."""


class StoredNames:
    """Maps the tensor names of any checkpoint that a model can be loaded from to the model's parameters."""

    def __init__(self, model: Any) -> None:
        mapping = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._prefix: str = model.base_model_prefix
        state: Mapping[str, Tensor] = model.state_dict(keep_vars=True)
        self.shapes = {name: None if is_codes(tensor) else tuple(tensor.shape) for name, tensor in state.items()}
        """Shape of everything that the model can load, by name; None if it holds quantization codes."""

    def parameter_of(self, key: str, added: Iterable[str] = ()) -> tuple[str, str]:
        """Return the parameter that transformers loads from the stored tensor ``key``, and the pattern of the
        conversion that it goes through ('' if the tensor is the parameter).

        added: parameters that the model will have. The returned name need not be one of the model's parameters.
        """
        known = dict.fromkeys([*self.shapes, *added], True)
        renamed, pattern = rename_source_key(key, self._renamings, self._converters, self._prefix, known)
        if renamed not in known and key in known:
            renamed, pattern = key, None
        return renamed, pattern or ""

    def find_tensors(self, shapes: Mapping[str, Shape]) -> dict[str, StoredTensors]:
        """Return the tensors of every parameter that is stored as it is or as the separate matrices of a stack.

        shapes: shape of every stored tensor by its name.
        """
        by_parameter: dict[str, dict[str, list[str]]] = {}
        for key in sorted(shapes, key=dot_natural_key):  # the order in which transformers stacks experts
            name, pattern = self.parameter_of(key)
            if name in self.shapes:
                by_parameter.setdefault(name, {}).setdefault(pattern, []).append(key)
        stored = {name: self._match(name, parts, shapes) for name, parts in by_parameter.items()}
        return {name: tensors for name, tensors in stored.items() if tensors is not None}

    def _match(
        self, name: str, parts: Mapping[str, Sequence[str]], shapes: Mapping[str, Shape]
    ) -> StoredTensors | None:
        whole = self.shapes[name]
        if list(parts) == [""]:
            keys = parts[""]
            fits = len(keys) == 1 and whole in (None, tuple(shapes[keys[0]]))
            return StoredTensors(keys[0]) if fits else None
        patterns = self._stacking_order(set(parts))
        if not patterns or whole is None or any(len(parts[p]) != whole[0] for p in patterns):
            return None
        experts = tuple(zip(*(parts[p] for p in patterns), strict=True))
        rows = {sum(shapes[key][0] for key in keys) for keys in experts}
        rest = {tuple(shapes[key][1:]) for keys in experts for key in keys}
        return StoredTensors(experts=experts) if (rows, rest) == ({whole[1]}, {whole[2:]}) else None

    def _stacking_order(self, patterns: set[str]) -> Sequence[str]:
        """Return the patterns in the order in which their tensors are joined along a matrix's outputs; empty if the
        conversion does anything else than stack and join."""
        for converter in self._converters:
            if set(converter.source_patterns) == patterns and len(converter.target_patterns) == 1:
                first, *rest = converter.operations
                joins = [type(op) is Concatenate and op.dim == 1 for op in rest]
                stacks = type(first) is MergeModulelist and first.dim == 0
                return converter.source_patterns if stacks and joins in ([], [True]) else ()
        return ()


def restore_names(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return parameters under the names, and as the matrices, that the model's files have: what loading renamed or
    stacked is undone, so that other releases and programs find it."""
    stand_in = SimpleNamespace(_weight_conversions=_list_conversions(model), config=model.config)
    if not stand_in._weight_conversions:
        return dict(tensors)
    return dict(revert_weight_conversion(cast(PreTrainedModel, stand_in), dict(tensors)))


def _list_conversions(model: Any) -> list[Any]:
    """Return the conversions that the model was loaded with, else those that its files would need, such as those of a
    model from a GGUF file. Prefixes are those of the files that were loaded, so that no default has one."""
    loaded = [step for step in vars(model).get("_weight_conversions") or () if not _packs(step)]
    usual = get_model_conversion_mapping(model, add_legacy=False)
    return loaded or [step for step in usual if not isinstance(step, PrefixChange)]


def _packs(step: Any) -> bool:
    operations = step.operations if isinstance(step, WeightConverter) else []
    return any(type(operation).__module__.startswith(PACKING) for operation in operations)


def list_unpacked(model: Any) -> list[str]:
    """Return the modules of a packed model whose matrices are not, by all names that releases have for them.

    Without such a list each release packs what it takes for a linear layer: 4 has routers and experts as such, 5 not.
    """
    found = set()
    for name, value in model.named_parameters(remove_duplicate=False):
        path, _, leaf = name.rpartition(".")
        if value.ndim < 2 or is_codes(value) or isinstance(model.get_submodule(path), nn.Embedding):
            continue
        keys = list(restore_names(model, {name: value.detach().to("meta")}))
        if leaf == "weight" or len(keys) > 1:
            stored = keys[0].rpartition(".")[0] if len(keys) == 1 else _common_path(keys)
            found |= {stored, path, f"{model.base_model_prefix}.{stored}"}
    return sorted(found)


def _common_path(keys: Sequence[str]) -> str:
    """Return the module above all of these, such as that of a stack whose experts are stored one by one."""
    parts = zip(*(key.split(".") for key in keys), strict=False)
    return ".".join(own[0] for own in takewhile(lambda own: len(set(own)) == 1, parts))
