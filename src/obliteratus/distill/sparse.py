"""Sparse autoencoders, several at once: one loop of batched products with hand-written gradients.

Leading dimension everywhere: the streams, which share nothing but the order of their batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.optim.adam import adam

from obliteratus.core.errors import UserError
from obliteratus.core.progress import note, progress
from obliteratus.core.settings import FrozenModel
from obliteratus.core.shapes import Float, Int
from obliteratus.distill.coder import Coder, make_frame

# Adam's first step, in the angle that a unit row turns by: entries of such a row are about 1/√width, so dividing by
# √width makes it the same at every width. From there the rate falls to nothing, as 1 − (share done)². Of 0.03
# to 0.12, 0.075 came lowest on planted and on real rows (docs/experiments/sparse-autoencoders.md).
TURN = 0.075
# Adam remembers so much of squared gradients: some 190 steps in all are too few for its usual 0.999.
MEMORY = 0.99
# How many of the features begin at principal directions. All of them is a saddle (the held-out loss stood still for
# 8 to 12 epochs); half found the planted behaviour worse on three of four sets (cosine 0.92–0.98, not 0.96–0.99).
PRINCIPAL = 0.75
# How strongly the others begin to fire: at 1, all together rebuild a row several times over, and most then die.
QUIET = 0.3
# Rows of one step: 400 rows make 17 steps an epoch. 32 learn less in as many epochs, 16 take longer for as much.
BATCH = 24
# Copies of the weights alive in training: themselves, their gradient, Adam's two moments, the best so far, one passing.
COPIES = 6
# Bytes to train at once on a CPU: what its last-level cache holds. Four 128-wide streams at once take 0.7 of the time
# of one after the other; four 576-wide ones, of 64 MB each, 1.4 times as long.
CPU_BYTES = 16e6


class Training(FrozenModel):
    """How to train."""

    expansion: int = Field(2, ge=1, le=16)
    """Features per dimension that the rows span (at most the width, or the number of rows trained on). On planted
    features (docs/experiments/sparse-autoencoders.md) 1 and 2 found the behaviour best, 8 worst."""
    sparsity: float = Field(0.1, gt=0, le=1)
    """Weight of Σf, in units of the root mean square length of a row; see `sae_loss`."""
    max_epochs: int = Field(11, ge=1, le=1000)
    """The rate falls to nothing over so many. Ten left planted rows half a point less explained than thirty do."""
    patience: int = Field(5, ge=1)
    """Stop after so many epochs without a gain of ``min_gain``."""
    min_gain: float = Field(0.01, ge=0, lt=1)
    """The share by which the held-out loss must fall to count."""
    seed: int = 0


@dataclass(frozen=True)
class Fitted:
    """A trained coder, and how well it is trained."""

    coder: Coder
    epochs: Int[Tensor, " streams"]
    """Epochs until it stopped."""
    explained: Float[Tensor, " streams"]
    """1 − Σ‖x − x̂‖² / Σ‖x‖² over the held-out rows."""
    dead: Int[Tensor, " streams"]
    """Features that fire on none of the rows trained on."""


def sae_loss(x: Float[Tensor, "streams rows width"], coder: Coder, sparsity: float) -> Float[Tensor, " streams"]:
    """Mean over the rows of ‖x − x̂‖² + sparsity · Σf. Decoder rows have length 1, so Σf has the unit of ‖x‖."""
    fired = coder.encode(x)
    error = (coder.decode(fired) - x).square().sum(2)
    return (error + sparsity * fired.sum(2)).mean(1)


def sae_gradients(x: Float[Tensor, "streams rows width"], coder: Coder, sparsity: float) -> list[Tensor]:
    """Gradient of `sae_loss` by each of ``coder.parts``, for ReLU; tested against autograd in fp64."""
    fired = coder.encode(x)
    error = (coder.decode(fired) - x) * (2 / x.shape[1])
    inner = (error @ coder.decoder.mT + sparsity / x.shape[1]) * (fired > 0)
    bias = inner.sum(1)
    offset = error.sum(1) - torch.einsum("sf,swf->sw", bias, coder.encoder)
    return [(x - coder.offset[:, None]).mT @ inner, bias, fired.mT @ error, offset]


def initialize_coder(
    x: Float[Tensor, "streams rows k"],
    axes: Float[Tensor, "streams k k"],
    how: Training,
    generator: torch.Generator,
) -> Coder:
    """Most features at principal directions of both signs, the rest at rows drawn by chance.

    A few hundred rows do not move features far from where they begin, so they begin at the data (not at the labels).
    With the bias −sparsity/2 an orthonormal dictionary would be at its optimum at once.
    """
    features = how.expansion * x.shape[2]
    axes = axes[:, : int(PRINCIPAL * features / 2)]
    drawn = torch.randint(x.shape[1], (features - 2 * axes.shape[1],), generator=generator)
    jitter = torch.randn(len(drawn), x.shape[2], generator=generator) / x.shape[2] ** 0.5  # no two the same
    rows = torch.nn.functional.normalize(x[:, drawn.to(x.device)], dim=2) + 0.1 * jitter.to(x)
    decoder = torch.nn.functional.normalize(torch.cat([axes, -axes, rows], 1), dim=2)
    bias = torch.full(decoder.shape[:2], -how.sparsity / 2).to(x)
    gain = torch.ones_like(bias).index_fill(1, torch.arange(2 * axes.shape[1], bias.shape[1], device=x.device), QUIET)
    return Coder((decoder * gain[..., None]).mT.contiguous(), bias, decoder.contiguous(), torch.zeros_like(x[:, 0]))


@torch.no_grad()
def fit_coder(x: Float[Tensor, "streams rows width"], how: Training) -> Fitted:
    """Train until the held-out fifth gains no more. x: centred, of root mean square length 1; at least 5 rows."""
    generator = torch.Generator().manual_seed(how.seed)
    order = torch.randperm(x.shape[1], generator=generator).to(x.device)
    fifth = x.shape[1] // 5
    held, seen = x[:, order[:fifth]], x[:, order[fifth:]]
    space = make_frame(seen, generator)
    inner = space.inside(seen)
    loop = _Loop(inner, space.inside(held), how, initialize_coder(inner, space.axes, how, generator))
    for _ in range(how.max_epochs):
        if not len(loop.live):
            break
        loop.epoch(torch.randperm(seen.shape[1], generator=generator).to(x.device))
        loop.judge()
    coder = space.outside(Coder(*loop.best))
    error = (coder.decode(coder.encode(held)) - held).square().sum((1, 2))
    explained = 1 - error / held.square().sum((1, 2)).clamp(min=torch.finfo(held.dtype).tiny)
    return Fitted(coder, loop.epochs, explained, count_dead(coder, seen))


def count_dead(coder: Coder, x: Float[Tensor, "streams rows width"]) -> Int[Tensor, " streams"]:
    """How many features fire on none of the rows."""
    return (coder.encode(x) == 0).all(1).sum(1)


class _Loop:
    """The state of the streams that still learn; one that has stopped leaves the batch and costs no more."""

    def __init__(self, seen: Tensor, held: Tensor, how: Training, coder: Coder) -> None:
        self.seen, self.held, self.how = seen, held, how
        self.live = torch.arange(len(seen), device=seen.device)
        self.parts = coder.parts
        self.first, self.second = ([torch.zeros_like(p) for p in self.parts] for _ in range(2))
        self.steps = [torch.zeros((), device=seen.device) for _ in self.parts]
        self.best = [p.clone() for p in self.parts]
        self.loss = sae_loss(held, coder, how.sparsity)
        self.mark = self.loss.clone()  # the loss that the next must undercut by min_gain
        self.done, self.total = 0, how.max_epochs * -(-seen.shape[1] // BATCH)  # steps
        self.stale, self.epochs = (torch.zeros_like(self.live) for _ in range(2))

    def epoch(self, order: Tensor) -> None:
        """One pass over the rows."""
        for rows in order.split(BATCH):
            self.step(self.seen[:, rows])
        self.epochs[self.live] += 1

    def step(self, x: Tensor) -> None:
        """One step of Adam, then decoder rows back to length 1."""
        gradients = sae_gradients(x, Coder(*self.parts), self.how.sparsity)
        rate = TURN / x.shape[2] ** 0.5 * (1 - (self.done / self.total) ** 2)
        settings: dict[str, Any] = {"fused": True, "amsgrad": False, "maximize": False, "weight_decay": 0.0}
        settings |= {"lr": rate, "beta1": 0.9, "beta2": MEMORY, "eps": 1e-8}  # beta1, eps: Adam's own
        adam(self.parts, gradients, self.first, self.second, [], self.steps, **settings)
        self.parts[2].div_(self.parts[2].norm(dim=2, keepdim=True).clamp(min=1e-12))
        self.done += 1

    def judge(self) -> None:
        """Keep what is better; drop the streams that were not better by min_gain for so long."""
        loss = sae_loss(self.held, Coder(*self.parts), self.how.sparsity)
        better = loss < self.loss[self.live]
        for best, part in zip(self.best, self.parts, strict=True):
            best[self.live[better]] = part[better]
        self.loss[self.live[better]] = loss[better]
        gained = loss < self.mark[self.live] * (1 - self.how.min_gain)
        self.mark[self.live[gained]] = loss[gained]
        self.stale[self.live] = torch.where(gained, 0, self.stale[self.live] + 1)
        stays = self.stale[self.live] < self.how.patience
        if not stays.all():
            self.keep(stays)

    def keep(self, stays: Tensor) -> None:
        """Shrink the batch."""
        self.live, self.seen, self.held = self.live[stays], self.seen[stays], self.held[stays]
        self.parts, self.first, self.second = (
            [p[stays] for p in group] for group in (self.parts, self.first, self.second)
        )


# ------------------------------------------------------------------------------------------------------ devices
def train_coders(x: Float[Tensor, "streams rows width"], how: Training, device: str) -> Coder:
    """`fit_coder` on the device, as many streams at a time as its memory (CPU: cache) holds; the coder is on the CPU."""
    needed = _bytes(x, how)
    where, free, why = _device(device, needed)
    parts: list[Fitted] = []
    with progress("DISTILL sae", len(x)) as advance:
        for some in x.split(max(1, int(free // needed))):
            parts.append(fit_coder(some.to(where), how))
            advance(len(some))
    note("DISTILL sae", f"{_quality(parts)}; on {where} ({why})")
    return Coder(*(torch.cat([fitted.coder.parts[i].cpu() for fitted in parts]) for i in range(4)))


def _quality(parts: list[Fitted]) -> str:
    def span(values: list[Tensor], unit: float = 1) -> str:
        every = torch.cat([v.cpu() for v in values]) * unit
        low, high = (f"{float(v):.0f}" for v in (every.min(), every.max()))
        return low if low == high else f"{low}–{high}"

    streams, features = sum(len(p.epochs) for p in parts), parts[0].coder.bias.shape[1]
    return (
        f"{streams} streams of {features} features: {span([p.explained for p in parts], 100)} % of held-out rows "
        f"explained, {span([p.epochs for p in parts])} epochs, {span([p.dead for p in parts])} features never fire"
    )


def _bytes(x: Tensor, how: Training) -> int:
    """Working memory of one stream, fp32: encoder and decoder some times over in the rows' span, its rows, and the
    coder at full width."""
    rows, width = x.shape[1:]
    span = min(rows, width)
    return 4 * (COPIES * 2 * how.expansion * span**2 + 3 * rows * width + 2 * how.expansion * span * width)


def _device(wanted: str, needed: int) -> tuple[str, float, str]:
    """Where to train, the bytes that may be used there (half of what is free: the model runs again), and why there."""
    found = torch.cuda.is_available()
    if wanted == "cuda" and not found:
        raise UserError("distill step 'sae': device='cuda', but this machine has none; set device='auto'")
    free = torch.cuda.mem_get_info()[0] / 2 if found else 0.0
    if wanted == "cuda" or (wanted == "auto" and free > needed):
        return "cuda", free, f"{free / 1e9:.1f} GB to use"
    short = f"one stream needs {needed / 1e9:.1f} GB, the GPU has {free / 1e9:.1f} to use" if found else "no GPU"
    return "cpu", CPU_BYTES, "as asked" if wanted == "cpu" else short
