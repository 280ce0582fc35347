"""The mixture of experts as it is trained: in the dense model, whose MLP is computed once for all experts.

Experts differ by low-rank additions to the down projection alone, so Σ wₑ (D + BₑAₑ) h = D h + Σ wₑ BₑAₑ h: a step
costs little more than one of the dense model, and with the additions left out that model is there as the teacher.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from examples import Example
from losses import FIRST_TOKEN, answer_logits, starts
from measure import kl
from torch import Tensor, nn
from torch.nn import functional as F

from obliteratus.weights.upcycling import TOP_K, Experts

TINY = 1e-12  # added under the root: no gradient is infinite where experts are the same


class Mixture(nn.Module):
    """Stands in the place of a dense MLP; the parts begin at zero, which leaves the model as it is."""

    def __init__(self, mlp: Any, experts: int, rank: int) -> None:
        super().__init__()
        width, inner = mlp.down_proj.weight.shape
        self.mlp = mlp
        self.router = nn.Parameter(torch.zeros(experts, width))
        self.a = nn.Parameter(torch.zeros(experts, rank, inner))
        self.b = nn.Parameter(torch.zeros(experts, width, rank))
        self.on = True
        # Of the last call: router probabilities [row, token, expert] and how far the experts are apart [row, token].
        self.seen = (torch.empty(0, 0, experts), torch.empty(0, 0))

    def forward(self, x: Tensor) -> Tensor:
        """The mixture's output for x [row, token, width], or the dense MLP's when it is not on."""
        inner = self.mlp.act_fn(self.mlp.gate_proj(x)) * self.mlp.up_proj(x)
        dense: Tensor = self.mlp.down_proj(inner)
        if not self.on:
            return dense
        added = torch.einsum("...er,ehr->...eh", torch.einsum("...i,eri->...er", inner, self.a), self.b)
        probabilities = F.linear(x, self.router).softmax(-1)
        self.seen = probabilities, apart(dense, added)
        return dense + (chosen(probabilities)[..., None] * added).sum(-2)


def chosen(probabilities: Tensor) -> Tensor:
    """The weights of the TOP_K likeliest experts, which sum to one, and zeros; [..., expert]."""
    top, index = probabilities.topk(TOP_K, dim=-1)
    return torch.zeros_like(probabilities).scatter(-1, index, top / top.sum(-1, keepdim=True))


def apart(dense: Tensor, added: Tensor) -> Tensor:
    """How far the outputs of two experts are from each other, as a share of the dense output's norm, [...].

    The root of the mean square over pairs, which is twice the square around the experts' mean by n − 1.
    """
    around = (added - added.mean(-2, keepdim=True)).square().sum((-1, -2)) / (added.shape[-2] - 1)
    return (2 * around / dense.square().sum(-1) + TINY).sqrt()


def mix(model: Any, experts: int, rank: int) -> list[Mixture]:
    """Put mixtures in the places of a dense model's MLPs; they alone are trained from here on."""
    model.requires_grad_(False)
    for layer in model.model.layers:
        layer.mlp = Mixture(layer.mlp, experts, rank)
    return [layer.mlp for layer in model.model.layers]


def experts_of(mixtures: list[Mixture]) -> Experts:
    """The experts as they are now."""
    router, a, b = zip(*((m.router.detach(), m.a.detach(), m.b.detach()) for m in mixtures), strict=True)
    return Experts(torch.stack(router), torch.stack(a), torch.stack(b))


@contextmanager
def dense_only(mixtures: list[Mixture]) -> Iterator[None]:
    """The dense model, in the place of the mixture."""
    for mixture in mixtures:
        mixture.on = False
    try:
        yield
    finally:
        for mixture in mixtures:
            mixture.on = True


def losses(model: Any, mixtures: list[Mixture], batch: list[Example], goal: float) -> dict[str, Tensor]:
    """What a batch asks for, each a scalar: `kl` (dense‖mixture) and the answers' `entropy` (cross-entropy), nats a
    token, plus FIRST_TOKEN × that of the first tokens; `balance`, 1 where loads are even; and `nearness`, the square
    of what the experts lack of being `goal` apart."""
    with torch.no_grad(), dense_only(mixtures):
        teacher = F.log_softmax(answer_logits(model, batch), dim=-1)
    student = F.log_softmax(answer_logits(model, batch), dim=-1)
    wanted = torch.tensor([token for e in batch for token in e.answer])
    each = {"kl": kl(teacher, student), "entropy": F.nll_loss(student, wanted, reduction="none")}
    first = starts(batch)
    of_tokens = {name: all_of.mean() + FIRST_TOKEN * all_of[first].mean() for name, all_of in each.items()}
    return of_tokens | routing_losses(mixtures, batch, goal)


def routing_losses(mixtures: list[Mixture], batch: list[Example], goal: float) -> dict[str, Tensor]:
    """`balance` and `nearness` of the call that was last, means over the layers."""
    own = own_tokens(batch, mixtures[0].seen[1].shape[1])
    even, far = zip(*((balance(p[own]), d[own].mean()) for p, d in (m.seen for m in mixtures)), strict=True)
    return {"balance": torch.stack(even).mean(), "nearness": F.relu(goal - torch.stack(far)).square().mean()}


def own_tokens(batch: list[Example], width: int) -> Tensor:
    """Which of the last `width` columns of the padded batch are no padding, [row, token].

    The columns before them are the beginning that all rows share: `answer_logits` computes it once, in another call.
    """
    lengths = torch.tensor([len(e.prompt) + len(e.answer) for e in batch])
    return torch.arange(width) < (lengths - int(lengths.max()) + width)[:, None]


def balance(probabilities: Tensor) -> Tensor:
    """Experts × Σ (share of choices × mean probability), arXiv:2101.03961: 1 where loads are even, up to 2 of 4."""
    load = (chosen(probabilities) > 0).float().mean(0) / TOP_K
    return probabilities.shape[-1] * (load * probabilities.mean(0)).sum()
