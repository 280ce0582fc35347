"""The mixture of experts during training, inside the dense model, whose MLP is computed once for all experts.

Experts differ only by low-rank additions to the down projection, so Σ wₑ (D + BₑAₑ) h = D h + Σ wₑ BₑAₑ h. A step
therefore costs little more than a step of the dense model, and without the additions that model is the teacher.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from examples import Example
from losses import FIRST_TOKEN, answer_starts, compute_answer_logits
from measure import kl_divergence
from torch import Tensor, nn
from torch.nn import functional as F

from obliteratus.weights.upcycling import TOP_K, Experts

TINY = 1e-12  # added under the root, so that no gradient is infinite where experts are equal


class Mixture(nn.Module):
    """Replaces a dense MLP. All parts begin at zero, which leaves the model unchanged."""

    def __init__(self, mlp: Any, experts: int, rank: int) -> None:
        super().__init__()
        width, inner = mlp.down_proj.weight.shape
        self.mlp = mlp
        self.router = nn.Parameter(torch.zeros(experts, width))
        self.a = nn.Parameter(torch.zeros(experts, rank, inner))
        self.b = nn.Parameter(torch.zeros(experts, width, rank))
        self.on = True
        # Router probabilities [row, token, expert] and distance of experts [row, token] in the last call.
        self.seen = (torch.empty(0, 0, experts), torch.empty(0, 0))

    def forward(self, x: Tensor) -> Tensor:
        """Return the mixture's output for x [row, token, width], or the dense MLP's if `on` is false."""
        inner = self.mlp.act_fn(self.mlp.gate_proj(x)) * self.mlp.up_proj(x)
        dense: Tensor = self.mlp.down_proj(inner)
        if not self.on:
            return dense
        added = torch.einsum("...er,ehr->...eh", torch.einsum("...i,eri->...er", inner, self.a), self.b)
        probabilities = F.linear(x, self.router).softmax(-1)
        self.seen = probabilities, expert_distance(dense, added)
        return dense + (choose_experts(probabilities)[..., None] * added).sum(-2)


def choose_experts(probabilities: Tensor) -> Tensor:
    """Return the weights [..., expert] of the TOP_K likeliest experts, which sum to one; all others are zero."""
    top, index = probabilities.topk(TOP_K, dim=-1)
    return torch.zeros_like(probabilities).scatter(-1, index, top / top.sum(-1, keepdim=True))


def expert_distance(dense: Tensor, added: Tensor) -> Tensor:
    """Return the root mean square distance between two experts' outputs, relative to the dense output's norm, [...].

    The mean square over pairs is twice the sum of squares around the experts' mean, divided by n − 1.
    """
    around = (added - added.mean(-2, keepdim=True)).square().sum((-1, -2)) / (added.shape[-2] - 1)
    return (2 * around / dense.square().sum(-1) + TINY).sqrt()


def insert_mixtures(model: Any, experts: int, rank: int) -> list[Mixture]:
    """Replace the MLPs of a dense model by mixtures, make these the only trainable parts, and return them."""
    model.requires_grad_(False)
    for layer in model.model.layers:
        layer.mlp = Mixture(layer.mlp, experts, rank)
    return [layer.mlp for layer in model.model.layers]


def collect_experts(mixtures: list[Mixture]) -> Experts:
    """Return the experts as they are now."""
    router, a, b = zip(*((m.router.detach(), m.a.detach(), m.b.detach()) for m in mixtures), strict=True)
    return Experts(torch.stack(router), torch.stack(a), torch.stack(b))


@contextmanager
def dense_only(mixtures: list[Mixture]) -> Iterator[None]:
    """Compute the dense model instead of the mixture inside."""
    for mixture in mixtures:
        mixture.on = False
    try:
        yield
    finally:
        for mixture in mixtures:
            mixture.on = True


def mixture_losses(model: Any, mixtures: list[Mixture], batch: list[Example], goal: float) -> dict[str, Tensor]:
    """Return the losses of a batch as scalars.

    These are `kl` (dense‖mixture) and `entropy` (cross-entropy of the answers) in nats per token, both plus
    FIRST_TOKEN × that of the first tokens; `balance`, 1 for even loads; and `nearness`, the mean square of the amount
    by which the distance of experts falls short of `goal`.
    """
    with torch.no_grad(), dense_only(mixtures):
        teacher = F.log_softmax(compute_answer_logits(model, batch), dim=-1)
    student = F.log_softmax(compute_answer_logits(model, batch), dim=-1)
    wanted = torch.tensor([token for e in batch for token in e.answer])
    each = {"kl": kl_divergence(teacher, student), "entropy": F.nll_loss(student, wanted, reduction="none")}
    first = answer_starts(batch)
    of_tokens = {name: all_of.mean() + FIRST_TOKEN * all_of[first].mean() for name, all_of in each.items()}
    return of_tokens | routing_losses(mixtures, batch, goal)


def routing_losses(mixtures: list[Mixture], batch: list[Example], goal: float) -> dict[str, Tensor]:
    """Return `balance` and `nearness` of the last call, means over the layers."""
    own = own_token_mask(batch, mixtures[0].seen[1].shape[1])
    even, far = zip(*((load_balance(p[own]), d[own].mean()) for p, d in (m.seen for m in mixtures)), strict=True)
    return {"balance": torch.stack(even).mean(), "nearness": F.relu(goal - torch.stack(far)).square().mean()}


def own_token_mask(batch: list[Example], width: int) -> Tensor:
    """Return which of the last `width` columns of the padded batch are not padding, [row, token].

    The columns before them are the prefix that all rows share, which `compute_answer_logits` runs in a call of its own.
    """
    lengths = torch.tensor([len(e.prompt) + len(e.answer) for e in batch])
    return torch.arange(width) < (lengths - int(lengths.max()) + width)[:, None]


def load_balance(probabilities: Tensor) -> Tensor:
    """Return experts × Σ (share of choices × mean probability), arXiv:2101.03961: 1 for even loads, up to 2 for 4."""
    load = (choose_experts(probabilities) > 0).float().mean(0) / TOP_K
    return probabilities.shape[-1] * (load * probabilities.mean(0)).sum()
