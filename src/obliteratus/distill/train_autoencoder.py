"""Train sparse autoencoders for several streams at once, by batched products with hand-written gradients.

The leading dimension of every tensor counts streams. Streams share nothing but the order of their batches.
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
from obliteratus.distill.autoencoder import SparseAutoencoder

# Adam's first step, as the angle that a unit row turns by: entries of such a row are about 1/√width, so dividing by
# √width makes the angle the same at every width. From there the rate falls to zero as 1 − (share of steps done)². Of
# 0.03 to 0.12, 0.075 gave the lowest loss on planted and on real rows (docs/experiments/sparse-autoencoders.md).
FIRST_STEP = 0.075
# Adam's decay of squared gradients: the usual 0.999 is too slow for about 190 steps in all.
ADAM_BETA2 = 0.99
# Share of the features that start at principal directions. Starting all of them there is a saddle (the held-out loss
# stood still for 8 to 12 epochs); half found the planted behavior worse on three of four sets (cosine 0.92–0.98
# instead of 0.96–0.99).
PRINCIPAL_SHARE = 0.75
# Initial encoder gain of the other features: at 1 they together reconstruct a row several times over, and most die.
RANDOM_ENCODER_GAIN = 0.3
# Rows per step: 400 rows make 17 steps an epoch. 32 rows learn less in as many epochs; 16 take longer for the same.
BATCH_ROWS = 24
# Copies of the weights during training: weights, gradient, Adam's two moments, the best so far, and one temporary.
WEIGHT_COPIES = 6
# Bytes to train at once on a CPU, about its last-level cache. Four 128-wide streams together take 0.7 times as long as
# one after the other; four 576-wide streams of 64 MB each take 1.4 times as long.
CPU_BYTES = 16e6


class Training(FrozenModel):
    """Options of training."""

    expansion: int = Field(2, ge=1, le=16)
    """Features per dimension that the training rows span (at most the width, or the number of rows). On planted
    features (docs/experiments/sparse-autoencoders.md) 1 and 2 found the behavior best, 8 worst."""
    sparsity: float = Field(0.1, gt=0, le=1)
    """Weight of Σf, in units of the root mean square length of a row; see `sae_loss`."""
    max_epochs: int = Field(11, ge=1, le=1000)
    """The learning rate falls to zero over this many epochs. Ten explained half a point less of planted rows than
    thirty."""
    patience: int = Field(5, ge=1)
    """Stop after this many epochs without a gain of ``min_gain``."""
    min_gain: float = Field(0.01, ge=0, lt=1)
    """Relative drop of the held-out loss that counts as a gain."""
    seed: int = 0


@dataclass(frozen=True)
class TrainedAutoencoder:
    """A trained autoencoder, and how training went."""

    autoencoder: SparseAutoencoder
    epochs: Int[Tensor, " streams"]
    """Epochs until training stopped."""
    explained: Float[Tensor, " streams"]
    """Explained share of the held-out rows: 1 − Σ‖x − x̂‖² / Σ‖x‖²."""
    dead: Int[Tensor, " streams"]
    """Number of features that fire on none of the training rows."""


def sae_loss(
    x: Float[Tensor, "streams rows width"], autoencoder: SparseAutoencoder, sparsity: float
) -> Float[Tensor, " streams"]:
    """Return the mean over rows of ‖x − x̂‖² + sparsity · Σf; decoder rows have length 1, so Σf has the unit of ‖x‖."""
    features = autoencoder.encode(x)
    error = (autoencoder.decode(features) - x).square().sum(2)
    return (error + sparsity * features.sum(2)).mean(1)


def sae_gradients(
    x: Float[Tensor, "streams rows width"], autoencoder: SparseAutoencoder, sparsity: float
) -> list[Tensor]:
    """Return the gradients of `sae_loss` by ``autoencoder.parameters``, for ReLU; tested against autograd in fp64."""
    features = autoencoder.encode(x)
    error = (autoencoder.decode(features) - x) * (2 / x.shape[1])
    inner = (error @ autoencoder.decoder.mT + sparsity / x.shape[1]) * (features > 0)
    bias = inner.sum(1)
    offset = error.sum(1) - torch.einsum("sf,swf->sw", bias, autoencoder.encoder)
    return [(x - autoencoder.offset[:, None]).mT @ inner, bias, features.mT @ error, offset]


def initialize_autoencoder(
    x: Float[Tensor, "streams rows k"],
    axes: Float[Tensor, "streams k k"],
    training: Training,
    generator: torch.Generator,
) -> SparseAutoencoder:
    """Start most features at principal directions of both signs, and the rest at randomly drawn rows.

    A few hundred rows do not move features far from their start, so they start at the data (without using the labels).
    With the bias −sparsity/2 an orthonormal dictionary would be optimal from the start.
    """
    features = training.expansion * x.shape[2]
    axes = axes[:, : int(PRINCIPAL_SHARE * features / 2)]
    drawn = torch.randint(x.shape[1], (features - 2 * axes.shape[1],), generator=generator)
    jitter = torch.randn(len(drawn), x.shape[2], generator=generator) / x.shape[2] ** 0.5  # so that no two are equal
    rows = torch.nn.functional.normalize(x[:, drawn.to(x.device)], dim=2) + 0.1 * jitter.to(x)
    decoder = torch.nn.functional.normalize(torch.cat([axes, -axes, rows], 1), dim=2)
    bias = torch.full(decoder.shape[:2], -training.sparsity / 2).to(x)
    random_features = torch.arange(2 * axes.shape[1], bias.shape[1], device=x.device)
    gain = torch.ones_like(bias).index_fill(1, random_features, RANDOM_ENCODER_GAIN)
    encoder = (decoder * gain[..., None]).mT.contiguous()
    return SparseAutoencoder(encoder, bias, decoder.contiguous(), torch.zeros_like(x[:, 0]))


@torch.no_grad()
def fit_autoencoder(x: Float[Tensor, "streams rows width"], training: Training) -> TrainedAutoencoder:
    """Train until the loss on a held-out fifth of the rows stops falling.

    x: at least 5 rows, centered, of root mean square length 1.
    """
    generator = torch.Generator().manual_seed(training.seed)
    order = torch.randperm(x.shape[1], generator=generator).to(x.device)
    fifth = x.shape[1] // 5
    held_out, train = x[:, order[:fifth]], x[:, order[fifth:]]
    space = make_row_space(train, generator)
    inner = space.to_coordinates(train)
    start = initialize_autoencoder(inner, space.axes, training, generator)
    loop = _TrainingLoop(inner, space.to_coordinates(held_out), training, start)
    for _ in range(training.max_epochs):
        if not len(loop.active):
            break
        loop.run_epoch(torch.randperm(train.shape[1], generator=generator).to(x.device))
        loop.evaluate()
    autoencoder = space.to_full_width(SparseAutoencoder(*loop.best))
    error = (autoencoder.decode(autoencoder.encode(held_out)) - held_out).square().sum((1, 2))
    explained = 1 - error / held_out.square().sum((1, 2)).clamp(min=torch.finfo(held_out.dtype).tiny)
    return TrainedAutoencoder(autoencoder, loop.epochs, explained, count_dead_features(autoencoder, train))


def count_dead_features(
    autoencoder: SparseAutoencoder, x: Float[Tensor, "streams rows width"]
) -> Int[Tensor, " streams"]:
    """Count the features that fire on none of the rows."""
    return (autoencoder.encode(x) == 0).all(1).sum(1)


class _TrainingLoop:
    """Training state. A stream that has stopped leaves the batch and costs nothing more."""

    def __init__(self, train: Tensor, held_out: Tensor, training: Training, start: SparseAutoencoder) -> None:
        self.train, self.held_out, self.training = train, held_out, training
        self.active = torch.arange(len(train), device=train.device)
        self.parameters = start.parameters
        self.first_moments, self.second_moments = ([torch.zeros_like(p) for p in self.parameters] for _ in range(2))
        self.steps = [torch.zeros((), device=train.device) for _ in self.parameters]
        self.best = [p.clone() for p in self.parameters]
        self.best_loss = sae_loss(held_out, start, training.sparsity)
        self.reference_loss = self.best_loss.clone()  # the next loss must undercut this by min_gain
        self.steps_done, self.total_steps = 0, training.max_epochs * -(-train.shape[1] // BATCH_ROWS)
        self.epochs_without_gain, self.epochs = (torch.zeros_like(self.active) for _ in range(2))

    def run_epoch(self, order: Tensor) -> None:
        """Take one step for each batch of rows, in this order."""
        for rows in order.split(BATCH_ROWS):
            self._step(self.train[:, rows])
        self.epochs[self.active] += 1

    def _step(self, x: Tensor) -> None:
        """Take one step of Adam, then scale decoder rows back to length 1."""
        gradients = sae_gradients(x, SparseAutoencoder(*self.parameters), self.training.sparsity)
        rate = FIRST_STEP / x.shape[2] ** 0.5 * (1 - (self.steps_done / self.total_steps) ** 2)
        settings: dict[str, Any] = {"fused": True, "amsgrad": False, "maximize": False, "weight_decay": 0.0}
        settings |= {"lr": rate, "beta1": 0.9, "beta2": ADAM_BETA2, "eps": 1e-8}  # beta1, eps: Adam's defaults
        adam(self.parameters, gradients, self.first_moments, self.second_moments, [], self.steps, **settings)
        self.parameters[2].div_(self.parameters[2].norm(dim=2, keepdim=True).clamp(min=1e-12))
        self.steps_done += 1

    def evaluate(self) -> None:
        """Keep the parameters of streams that improved; drop streams without a gain for ``patience`` epochs."""
        loss = sae_loss(self.held_out, SparseAutoencoder(*self.parameters), self.training.sparsity)
        better = loss < self.best_loss[self.active]
        for best, parameter in zip(self.best, self.parameters, strict=True):
            best[self.active[better]] = parameter[better]
        self.best_loss[self.active[better]] = loss[better]
        gained = loss < self.reference_loss[self.active] * (1 - self.training.min_gain)
        self.reference_loss[self.active[gained]] = loss[gained]
        self.epochs_without_gain[self.active] = torch.where(gained, 0, self.epochs_without_gain[self.active] + 1)
        remaining = self.epochs_without_gain[self.active] < self.training.patience
        if not remaining.all():
            self._drop_stopped_streams(remaining)

    def _drop_stopped_streams(self, remaining: Tensor) -> None:
        self.active, self.train, self.held_out = (x[remaining] for x in (self.active, self.train, self.held_out))
        self.parameters, self.first_moments, self.second_moments = (
            [p[remaining] for p in group] for group in (self.parameters, self.first_moments, self.second_moments)
        )


# ------------------------------------------------------------------------------------------ reduced coordinates
@dataclass(frozen=True)
class RowSpace:
    """Randomly rotated coordinates of the space that the training rows span.

    A few hundred rows teach nothing about what lies outside of their span, so width 4096 shrinks to 400. The rotation
    is there because Adam scales each coordinate separately and a stream's own coordinates are very unequal; at width
    576 it lowers the held-out loss with a third of the epochs.
    """

    basis: Float[Tensor, "streams k width"]
    """Orthonormal rows."""
    axes: Float[Tensor, "streams k k"]
    """The rows' principal directions in these coordinates, by descending size."""

    def to_coordinates(self, x: Float[Tensor, "streams rows width"]) -> Float[Tensor, "streams rows k"]:
        """Return the rows in these coordinates."""
        return x @ self.basis.mT

    def to_full_width(self, autoencoder: SparseAutoencoder) -> SparseAutoencoder:
        """Return the equivalent autoencoder for rows of the full width."""
        offset = torch.einsum("sk,skw->sw", autoencoder.offset, self.basis)
        encoder, decoder = self.basis.mT @ autoencoder.encoder, autoencoder.decoder @ self.basis
        return SparseAutoencoder(encoder, autoencoder.bias, decoder, offset)


def make_row_space(x: Float[Tensor, "streams rows width"], generator: torch.Generator) -> RowSpace:
    """Return coordinates of the rows' span, k = min(rows, width).

    They do not depend on the signs of singular vectors, so rounding does not change them.
    """
    left, _, axes = torch.linalg.svd(x, full_matrices=False)
    k = axes.shape[1]
    rotation = torch.linalg.qr(torch.randn(k, k, generator=generator)).Q.to(x)
    core = left if x.shape[1] == k else axes.mT
    return RowSpace(rotation @ core @ axes, core.mT @ rotation.T)


# ------------------------------------------------------------------------------------------------------ devices
def train_autoencoders(x: Float[Tensor, "streams rows width"], training: Training, device: str) -> SparseAutoencoder:
    """Train on the device, as many streams at a time as fit its memory (CPU: its cache), and return them on the CPU."""
    needed = _estimate_bytes(x, training)
    chosen, free, reason = _choose_device(device, needed)
    trained: list[TrainedAutoencoder] = []
    with progress("DISTILL sae", len(x)) as advance:
        for streams in x.split(max(1, int(free // needed))):
            trained.append(fit_autoencoder(streams.to(chosen), training))
            advance(len(streams))
    note("DISTILL sae", f"{_summarize(trained)}; on {chosen} ({reason})")
    return SparseAutoencoder(*(torch.cat([t.autoencoder.parameters[i].cpu() for t in trained]) for i in range(4)))


def _summarize(trained: list[TrainedAutoencoder]) -> str:
    def span(values: list[Tensor], unit: float = 1) -> str:
        joined = torch.cat([v.cpu() for v in values]) * unit
        low, high = (f"{float(v):.0f}" for v in (joined.min(), joined.max()))
        return low if low == high else f"{low}–{high}"

    streams, features = sum(len(t.epochs) for t in trained), trained[0].autoencoder.bias.shape[1]
    return (
        f"{streams} streams of {features} features: {span([t.explained for t in trained], 100)} % of held-out rows "
        f"explained, {span([t.epochs for t in trained])} epochs, {span([t.dead for t in trained])} features never fire"
    )


def _estimate_bytes(x: Tensor, training: Training) -> int:
    """Return the working memory of training one stream in fp32.

    It consists of the copies of encoder and decoder in the rows' span, the rows, and the autoencoder at full width.
    """
    rows, width = x.shape[1:]
    span = min(rows, width)
    features = training.expansion * span
    return 4 * (WEIGHT_COPIES * 2 * features * span + 3 * rows * width + 2 * features * width)


def _choose_device(wanted: str, needed: int) -> tuple[str, float, str]:
    """Return the device, the bytes to use there (half of what is free, as the model runs again), and the reason."""
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise UserError("distill step 'sae': device='cuda', but this machine has no CUDA GPU; set device='auto'")
    free = torch.cuda.mem_get_info()[0] / 2 if available else 0.0
    if wanted == "cuda" or (wanted == "auto" and free > needed):
        return "cuda", free, f"{free / 1e9:.1f} GB to use"
    short = f"one stream needs {needed / 1e9:.1f} GB, the GPU has {free / 1e9:.1f} to use" if available else "no GPU"
    return "cpu", CPU_BYTES, "as requested" if wanted == "cpu" else short
