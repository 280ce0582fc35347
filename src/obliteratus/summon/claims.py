"""How much of a model the table of architectures claims."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from transformers import PreTrainedModel

from obliteratus.summon.anatomy import blocks_of, branches_of
from obliteratus.summon.families import Family
from obliteratus.summon.quantised import dims
from obliteratus.types import Site


@dataclass(frozen=True)
class Coverage:
    """How many matrix parameters of the backbone the sites claim, stacks of matrices included. Vectors (norms, biases)
    are not counted."""

    writers: int
    readers: int
    inner: int
    """Declared to stand between readers and writers, as convolutions do: not of the stream."""
    unclaimed: int
    paths: tuple[str, ...]
    """Matrices that no site claims: nothing is known of them, so each could be a writer that was missed."""

    @property
    def share(self) -> float:
        """Writing parameters found; every unclaimed one counts as missed."""
        return self.writers / max(self.writers + self.unclaimed, 1)

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold, `share` included."""
        return {**asdict(self), "paths": list(self.paths), "share": self.share}


def coverage(model: PreTrainedModel, sites: tuple[Site, ...], family: Family) -> Coverage:
    """Count over the decoder blocks and all that stands beside them: embeddings, and whatever else."""
    backbone = family.layers.rpartition(".")[0] + "."
    role: dict[str, str] = {**_inner(model, family), **{site.parameter: site.role for site in sites}}
    biases = {f"{site.path}.{site.bias}" for site in sites}  # those of a stack have two axes
    count = {"writes": 0, "reads": 0, "inner": 0, "": 0}
    unclaimed = []
    for path, parameter in model.named_parameters():
        if not path.startswith(backbone) or parameter.ndim < 2 or path in biases:
            continue  # a vector can move the stream by a constant only
        count[role.get(path, "")] += prod(dims(parameter))
        if path not in role:
            unclaimed.append(path)
    return Coverage(count["writes"], count["reads"], count["inner"], count[""], tuple(unclaimed))


def _inner(model: PreTrainedModel, family: Family) -> dict[str, str]:
    found = dict.fromkeys(family.beside, "inner")
    for layer, block in enumerate(blocks_of(model, family)):
        for branch in branches_of(family, layer, block):
            found |= {f"{family.layers}.{layer}.{path}": "inner" for path in branch.inner}
    return found
