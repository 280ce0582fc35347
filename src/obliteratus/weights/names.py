"""Which tensors of a checkpoint's files make up a parameter of the model.

Asked of transformers itself: names go through the renamings and conversions that loading them goes through, so that
whatever it can load, such as experts kept one by one and stacked in memory, is found under its stored name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from obliteratus.weights.bitsandbytes import is_codes

Shape = Sequence[int]


@dataclass(frozen=True)
class StoredParameter:
    """Names of the tensors that make up one parameter."""

    key: str = ""
    """The one that is the parameter; empty where it is stored in parts."""
    experts: tuple[tuple[str, ...], ...] = ()
    """For each matrix of a stack, those that follow each other along its outputs."""


class StoredNames:
    """How a model's parameters are called in files that it can be loaded from."""

    def __init__(self, model: Any) -> None:
        found = get_model_conversion_mapping(model)
        self._renamings = [one for one in found if isinstance(one, WeightRenaming)]
        self._converters = [one for one in found if isinstance(one, WeightConverter)]
        self._prefix: str = model.base_model_prefix
        state: Mapping[str, Tensor] = model.state_dict(keep_vars=True)
        self.shapes = {name: None if is_codes(tensor) else tuple(tensor.shape) for name, tensor in state.items()}
        """Of everything that the model can load, by name; None where it holds codes."""

    def parameter(self, key: str, more: Iterable[str] = ()) -> tuple[str, str]:
        """(the parameter that is read from the stored tensor ``key``, the pattern by which it is converted: empty for
        one that is it). more: parameters that the model will have. As transformers' loading does; the name may be no
        parameter's."""
        known = dict.fromkeys([*self.shapes, *more], True)
        renamed, pattern = rename_source_key(key, self._renamings, self._converters, self._prefix, known)
        if renamed not in known and key in known:
            renamed, pattern = key, None
        return renamed, pattern or ""

    def where(self, shapes: Mapping[str, Shape]) -> dict[str, StoredParameter]:
        """By parameter, for all that are stored as they are or as a stack's matrices. shapes: by stored name."""
        held: dict[str, dict[str, list[str]]] = {}
        for key in sorted(shapes, key=dot_natural_key):  # the order in which loading stacks experts
            name, pattern = self.parameter(key)
            if name in self.shapes:
                held.setdefault(name, {}).setdefault(pattern, []).append(key)
        found = {name: self._found(name, parts, shapes) for name, parts in held.items()}
        return {name: where for name, where in found.items() if where is not None}

    def _found(
        self, name: str, parts: Mapping[str, Sequence[str]], shapes: Mapping[str, Shape]
    ) -> StoredParameter | None:
        whole = self.shapes[name]
        if list(parts) == [""]:
            keys = parts[""]
            fits = len(keys) == 1 and whole in (None, tuple(shapes[keys[0]]))
            return StoredParameter(keys[0]) if fits else None
        patterns = self._stacked(set(parts))
        if not patterns or whole is None or any(len(parts[p]) != whole[0] for p in patterns):
            return None
        experts = tuple(zip(*(parts[p] for p in patterns), strict=True))
        rows = {sum(shapes[key][0] for key in keys) for keys in experts}
        rest = {tuple(shapes[key][1:]) for keys in experts for key in keys}
        return StoredParameter(experts=experts) if (rows, rest) == ({whole[1]}, {whole[2:]}) else None

    def _stacked(self, patterns: set[str]) -> Sequence[str]:
        """The same patterns in the order in which their tensors follow each other; none where they are more than
        stacked, and joined along a matrix's outputs."""
        for one in self._converters:
            if set(one.source_patterns) == patterns and len(one.target_patterns) == 1:
                first, *then = one.operations
                joined = [type(op) is Concatenate and op.dim == 1 for op in then]
                plain = type(first) is MergeModulelist and first.dim == 0
                return one.source_patterns if plain and joined in ([], [True]) else ()
        return ()
