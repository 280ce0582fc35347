"""Single neurons, those that write most."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from obliteratus.core.errors import UserError
from obliteratus.core.shapes import Float
from obliteratus.core.types import Mask, Site, Subject
from obliteratus.inference.chat_template import Ids
from obliteratus.inference.token_losses import token_losses
from obliteratus.study.base import Knockout, StudyContext, strategies
from obliteratus.study.strategies import Layers, spec, writers
from obliteratus.weights.matrices import read_weight

DENSE = ("mlp.out", "shared.out")
By = Literal["written", "weight"]


@strategies.register("neurons")
def neurons(
    ground: StudyContext, *, layers: Layers = None, top: Annotated[int, Field(ge=1)] = 8, by: By = "written"
) -> Iterator[Knockout]:
    """The ``top`` neurons of each block's dense feed-forward matrix, one by one, by score.

    by: ``written``, the mean length of what the neuron writes on the study's texts, |a_j|·‖W_j‖; ``weight``, ‖W_j‖
    alone. UserError where all feed-forward halves are stacks of experts.
    """
    subject = ground.subject
    sites = [s for own in writers(subject, DENSE, layers).values() for s in own if not s.stacked]
    if not sites:
        raise UserError("study: all feed-forward matrices are stacks of experts; leave the strategy neurons out")
    active = activity(subject, ground.texts, sites) if by == "written" else {}
    for site in sites:
        lengths = read_weight(subject.module(site.path), site).norm(dim=0)
        score = lengths * active[site.path] if by == "written" else lengths
        for neuron in score.argsort(descending=True, stable=True)[:top].tolist():
            name = f"block {site.layer} {site.part.partition('.')[0]} neuron {neuron}"
            yield spec(subject, "neurons", name, [Mask(site, torch.tensor([neuron]))], neuron)


def activity(subject: Subject, texts: Ids, sites: Sequence[Site]) -> dict[str, Float[Tensor, " in"]]:
    """Mean |input| of each writer over all tokens of the texts, by path."""
    totals: dict[str, Tensor] = {}
    tokens = sum(map(len, texts))

    def keep(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            totals[path] = totals.get(path, torch.zeros(())) + args[0].abs().double().flatten(0, -2).sum(0).cpu()

        return hook

    handles = [subject.module(s.path).register_forward_pre_hook(keep(s.path)) for s in sites]
    try:
        for row in texts:  # one by one: no padding is counted
            token_losses(subject, [row])
    finally:
        for handle in handles:
            handle.remove()
    return {path: (total / tokens).float().to(subject.device) for path, total in totals.items()}
