"""A sparse autoencoder, and the coordinates that it is trained in.

Leading dimension everywhere: the streams, which share nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from obliteratus.core.shapes import Float


@dataclass(frozen=True)
class Coder:
    """f = g((x − offset)·encoder + bias), x̂ = f·decoder + offset; g keeps what is above the threshold."""

    encoder: Float[Tensor, "streams width features"]
    bias: Float[Tensor, "streams features"]
    decoder: Float[Tensor, "streams features width"]
    """Rows of unit length where it was trained here."""
    offset: Float[Tensor, "streams width"]
    threshold: Float[Tensor, " features"] | float = 0.0
    """0 is ReLU; a tensor is JumpReLU."""

    def encode(self, x: Float[Tensor, "streams rows width"]) -> Float[Tensor, "streams rows features"]:
        """How much each feature fires, ≥ 0."""
        before = torch.baddbmm(self.bias[:, None], x - self.offset[:, None], self.encoder)
        return before * (before > self.threshold)

    def decode(self, fired: Float[Tensor, "streams rows features"]) -> Float[Tensor, "streams rows width"]:
        """The rows rebuilt."""
        return torch.baddbmm(self.offset[:, None], fired, self.decoder)

    @property
    def parts(self) -> list[Tensor]:
        """What is trained."""
        return [self.encoder, self.bias, self.decoder, self.offset]


@dataclass(frozen=True)
class Frame:
    """Coordinates of the space that the rows span, turned by chance.

    What a few hundred rows do not span, they cannot teach: width 4096 shrinks to 400. Turned, since Adam takes each
    coordinate by itself and a stream's own coordinates are most unequal; at width 576 the held-out loss is then lower
    after a third of the epochs.
    """

    basis: Float[Tensor, "streams k width"]
    """Orthonormal rows."""
    axes: Float[Tensor, "streams k k"]
    """The rows' principal directions, by falling size, in these coordinates."""

    def inside(self, x: Float[Tensor, "streams rows width"]) -> Float[Tensor, "streams rows k"]:
        """Coordinates of rows."""
        return x @ self.basis.mT

    def outside(self, coder: Coder) -> Coder:
        """The same coder for rows of the whole width."""
        offset = torch.einsum("sk,skw->sw", coder.offset, self.basis)
        return Coder(self.basis.mT @ coder.encoder, coder.bias, coder.decoder @ self.basis, offset)


def make_frame(x: Float[Tensor, "streams rows width"], generator: torch.Generator) -> Frame:
    """k = min(rows, width). Does not hang on the signs of singular vectors, so that rounding changes nothing."""
    left, _, axes = torch.linalg.svd(x, full_matrices=False)
    k = axes.shape[1]
    turn = torch.linalg.qr(torch.randn(k, k, generator=generator)).Q.to(x)
    core = left if x.shape[1] == k else axes.mT
    return Frame(turn @ core @ axes, core.mT @ turn.T)
