"""What many prompts did in one stack of experts, added up batch by batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from obliteratus.core.types import Routed
from obliteratus.inference.hooks import ExpertRouting

Sums = dict[int, Tensor]
"""Expert → [its outputs' sum …, their squared lengths' sum, how many], float64: so rounding does not grow with them."""


@dataclass
class RoutingCounts:
    """One stack, by group. Held are sums alone, of the experts that were chosen at all."""

    sums: dict[str, Sums] = field(default_factory=dict)
    shares: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(self, group: str, batch: ExpertRouting) -> None:
        """The rows of a batch."""
        sums = self.sums.setdefault(group, {})
        self.shares.setdefault(group, []).append(batch.shares.double())
        for expert in batch.chosen.unique().tolist():
            mine = batch.outputs[batch.chosen == expert].double()
            told = torch.cat([mine.sum(0), mine.square().sum()[None], torch.tensor([len(mine)])])
            sums[expert] = sums[expert] + told if expert in sums else told

    def routed(self) -> dict[str, Routed]:
        """By group, for all experts of the stack."""
        return {group: _routed(sums, torch.cat(self.shares[group])) for group, sums in self.sums.items()}


def _routed(sums: Sums, shares: Tensor) -> Routed:
    some = next(iter(sums.values()))
    whole = torch.stack([sums.get(expert, torch.zeros_like(some)) for expert in range(shares.shape[1])])
    count = whole[:, -1]
    means = whole[:, :-1] / count.clamp(min=1)[:, None]
    spread = shares.var(0, correction=0) * len(shares) / max(len(shares) - 1, 1)
    told = (shares.mean(0).float(), spread.float(), len(shares))
    return Routed(*told, count.long(), means[:, :-1].float(), means[:, -1].float())


# ------------------------------------------------------------------------------------------ on disk
def routing_to_tensors(routed: Mapping[str, Mapping[str, Routed]]) -> dict[str, Tensor]:
    """All tensors by a name that tells stack, group and field."""
    every = ((f"routed/{path}/{group}", found) for path, groups in routed.items() for group, found in groups.items())
    return {f"{name}/{key}": torch.as_tensor(value) for name, found in every for key, value in vars(found).items()}


def routing_from_tensors(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Routed]]:
    """What `routing_to_tensors` named; other tensors are left out."""
    fields: dict[str, dict[str, dict[str, Tensor]]] = {}
    for name in (name for name in tensors if name.startswith("routed/")):
        _, path, group, key = name.split("/")
        fields.setdefault(path, {}).setdefault(group, {})[key] = tensors[name]
    return {path: {g: _read(own) for g, own in groups.items()} for path, groups in fields.items()}


def _read(own: Mapping[str, Tensor]) -> Routed:
    tensors = {key: value for key, value in own.items() if key != "prompts"}
    return Routed(prompts=int(own["prompts"]), **tensors)
