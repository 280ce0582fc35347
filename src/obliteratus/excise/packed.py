"""Edits of packed matrices: unpacked once for all changes, edited in fp32, packed once, and what that loses counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from obliteratus.excise.change import bias_after, changed, needs_bias, needs_weight
from obliteratus.summon.codec import read_bias, read_weight
from obliteratus.summon.quantised import Entries, requantised
from obliteratus.types import Change

Lazy = Callable[[], Tensor]


@dataclass
class Losses:
    """What packing cost, by site path: (‖stored − W′‖, ‖W′‖), Frobenius."""

    norms: dict[str, tuple[float, float]] = field(default_factory=dict)

    def summary(self) -> dict[str, float]:
        """``matrices``: how many; ``error``: ‖stored − W′‖ / ‖W′‖ over all of them; ``worst``: of one."""
        lost, whole = (sum(pair[i] ** 2 for pair in self.norms.values()) ** 0.5 for i in (0, 1))
        worst = max((a / max(b, TINY) for a, b in self.norms.values()), default=0.0)
        return {"matrices": float(len(self.norms)), "error": lost / max(whole, TINY), "worst": worst}


TINY = 1e-30  # a matrix of zeros loses nothing


def packed_entries(
    path: str, module: nn.Module, changes: Sequence[Change], dtype: torch.dtype, losses: Losses | None
) -> dict[str, Lazy]:
    """All that the edited module saves, by name in the model: codes, scales, and the bias (dtype: of a new one)."""
    names = list(module.state_dict())
    if "bias" not in names and any(needs_bias(c) for c in changes):
        names.append("bias")
    once = Once(partial(_made, path, module, changes, dtype, losses))
    return {f"{path}.{name}": partial(once.take, name) for name in names}


def _made(
    path: str, module: nn.Module, changes: Sequence[Change], dtype: torch.dtype, losses: Losses | None
) -> Entries:
    weight = read_weight(module, changes[0].site)
    bias = bias_after(module, changes, weight if needs_weight(changes) else None)
    for change in changes:
        weight = changed(change, weight)
    entries, lost = requantised(weight, module)
    if losses is not None:
        losses.norms[path] = (lost, float(torch.linalg.vector_norm(weight)))
    if bias is not None:
        old = read_bias(module, changes[0].site)
        entries["bias"] = bias.to(dtype if old is None else module.get_parameter("bias").dtype)
    return entries


class Once:
    """Entries of one module, all made when the first is asked for; each is handed out once and then forgotten."""

    def __init__(self, make: Callable[[], Entries]) -> None:
        self._make = make
        self._left: Entries = {}

    def take(self, name: str) -> Tensor:
        if name not in self._left:
            self._left = self._make()
        return self._left.pop(name)
