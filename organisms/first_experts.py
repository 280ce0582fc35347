"""The experts before training: a router from k-means over the MLPs' inputs, and random low-rank additions."""

from typing import Any

import torch
from examples import Example
from losses import compute_answer_logits
from measure import normalize, remove_component
from mixture import Mixture, dense_only, own_token_mask
from torch import Tensor

ROUNDS = 20  # of k-means; the exact number matters little, since training moves the router
SPREAD = 1.0  # standard deviation of a token's scores over experts; the likeliest expert gets about half the weight
PROBE = 1e-3  # size of the additions while their effect is measured; the layers above do not notice them


@torch.no_grad()
def initialize_experts(
    model: Any, mixtures: list[Mixture], batch: list[Example], goal: float, rng: torch.Generator
) -> None:
    """Initialize all parts in place, so that experts differ by `goal` of the MLP's output norm on the batch."""
    for mixture, x in zip(mixtures, collect_mlp_inputs(model, mixtures, batch), strict=True):
        mixture.router.copy_(fit_k_means_router(x, len(mixture.router), rng))
        mixture.a.copy_(torch.randn(mixture.a.shape, generator=rng) / mixture.a.shape[-1] ** 0.5)
        mixture.b.copy_(torch.randn(mixture.b.shape, generator=rng) * PROBE)
    compute_answer_logits(model, batch)
    for mixture in mixtures:
        distances = mixture.seen[1]
        mixture.b *= goal / distances[own_token_mask(batch, distances.shape[1])].mean()


def collect_mlp_inputs(model: Any, mixtures: list[Mixture], batch: list[Example]) -> list[Tensor]:
    """Return the MLP inputs of each layer in the dense model, [token, width], without the tokens that rows share."""
    given: list[Tensor] = [torch.empty(0)] * len(mixtures)
    hooks = [
        mixture.register_forward_pre_hook(lambda _m, args, i=i: given.__setitem__(i, args[0]))
        for i, mixture in enumerate(mixtures)
    ]
    try:
        with dense_only(mixtures):
            compute_answer_logits(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return [x[own_token_mask(batch, x.shape[1])] for x in given]


def fit_k_means_router(x: Tensor, experts: int, rng: torch.Generator) -> Tensor:
    """Return router rows [expert, width] that choose the nearest of `experts` centers by angle for x [token, width].

    A router has no biases, so the centers are unit vectors (spherical k-means). They are orthogonal to the mean of x,
    which would favor some experts for every token: with it, one expert of a layer got all tokens. Scores are scaled to
    SPREAD.
    """
    mean = x.mean(0, keepdim=True)
    rows = remove_component(x, mean)
    centers = rows[torch.randperm(len(rows), generator=rng)[:experts]]
    for _ in range(ROUNDS):
        nearest = (rows @ centers.T).argmax(-1)
        sums = torch.zeros_like(centers).index_add_(0, nearest, rows)
        empty = sums.norm(dim=-1) == 0  # a center without tokens stays where it is
        centers = normalize(torch.where(empty[:, None], centers, sums))
    return centers * SPREAD / (x @ centers.T).std(-1).mean()
