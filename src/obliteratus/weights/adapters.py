"""Layers that PEFT has put adapters around: what they hold without them, and with what the active ones add."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def is_adapted(module: nn.Module) -> bool:
    """Return whether PEFT has put adapters around the module. Without PEFT imported, none has any."""
    peft: Any = sys.modules.get("peft.tuners.tuners_utils")
    return peft is not None and isinstance(module, peft.BaseTunerLayer)


def find_adapted(model: nn.Module) -> list[str]:
    """Return the paths of all modules with adapters, the outer ones where they are nested."""
    found: list[str] = []
    for path, module in model.named_modules():
        if is_adapted(module) and not any(path.startswith(f"{outer}.") for outer in found):
            found.append(path)
    return found


def plain_module(module: nn.Module) -> nn.Module:
    """Return the module inside its adapters, or the module itself."""
    layer: Any = module
    return layer.get_base_layer() if is_adapted(module) else module


def merged_module(module: nn.Module) -> nn.Module:
    """Return a module whose weights hold what its active adapters add; one without adapters itself.

    The original stays as it is. What is returned is a copy where the adapters change anything.
    """
    layer: Any = module
    if not is_adapted(module):
        return module
    if layer.merged == (not layer.disable_adapters):
        return plain_module(module)
    made: Any = copy.deepcopy(layer)
    (made.unmerge if layer.disable_adapters else made.merge)()
    return plain_module(made)


def copy_merged(model: Any) -> Any:
    """Return a copy of a model with all active adapters merged into its weights. It takes as much memory again."""
    made = copy.deepcopy(model)
    for path in find_adapted(made):
        made.set_submodule(path, merged_module(made.get_submodule(path)))
    return made


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Inside, the model's modules are those within the adapters, so that it looks as before they were added."""
    adapted = {path: model.get_submodule(path) for path in find_adapted(model)}
    try:
        for path, module in adapted.items():
            model.set_submodule(path, plain_module(module))
        yield
    finally:
        for path, module in adapted.items():
            model.set_submodule(path, module)
