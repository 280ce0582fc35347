"""The experts before training: a router from k-means over what the MLPs are given, and random low-rank additions."""

from typing import Any

import torch
from examples import Example
from losses import answer_logits
from measure import unit, without
from mixture import Mixture, dense_only, own_tokens
from torch import Tensor

ROUNDS = 20  # of k-means; a choice: training moves the router on in any case
SPREAD = 1.0  # standard deviation of a token's scores over the experts: the likeliest one gets about half the weight
PROBE = 1e-3  # additions this small leave what the layers above are given as it is, while their effect is measured


@torch.no_grad()
def begin(model: Any, mixtures: list[Mixture], batch: list[Example], goal: float, rng: torch.Generator) -> None:
    """Set all parts, in place, so that experts are `goal` (a share of the MLP's output) apart on the batch's tokens."""
    for mixture, x in zip(mixtures, mlp_inputs(model, mixtures, batch), strict=True):
        mixture.router.copy_(k_means_router(x, len(mixture.router), rng))
        mixture.a.copy_(torch.randn(mixture.a.shape, generator=rng) / mixture.a.shape[-1] ** 0.5)
        mixture.b.copy_(torch.randn(mixture.b.shape, generator=rng) * PROBE)
    answer_logits(model, batch)
    for mixture in mixtures:
        distances = mixture.seen[1]
        mixture.b *= goal / distances[own_tokens(batch, distances.shape[1])].mean()


def mlp_inputs(model: Any, mixtures: list[Mixture], batch: list[Example]) -> list[Tensor]:
    """What each layer's MLP is given in the dense model, [token, width]: the batch's tokens but the shared ones."""
    given: list[Tensor] = [torch.empty(0)] * len(mixtures)
    hooks = [
        mixture.register_forward_pre_hook(lambda _m, args, i=i: given.__setitem__(i, args[0]))
        for i, mixture in enumerate(mixtures)
    ]
    try:
        with dense_only(mixtures):
            answer_logits(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return [x[own_tokens(batch, x.shape[1])] for x in given]


def k_means_router(x: Tensor, experts: int, rng: torch.Generator) -> Tensor:
    """Router rows [expert, width] that choose, for x [token, width], the nearest of `experts` centres by angle.

    A router has no biases, so centres are unit vectors (spherical k-means) across the mean of x, which would favour
    some experts for every token: with it one expert of a layer got all tokens. Scores are scaled to SPREAD.
    """
    mean = x.mean(0, keepdim=True)
    rows = without(x, mean)
    centres = rows[torch.randperm(len(rows), generator=rng)[:experts]]
    for _ in range(ROUNDS):
        nearest = (rows @ centres.T).argmax(-1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, rows)
        empty = sums.norm(dim=-1) == 0  # a centre that no token is nearest to stays where it is
        centres = unit(torch.where(empty[:, None], centres, sums))
    return centres * SPREAD / (x @ centres.T).std(-1).mean()
