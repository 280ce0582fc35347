"""What all that is fitted by steps shares: the best so far, when to stop, and batches by a step's number alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass
class EarlyStopping(Generic[T]):
    """What has the least loss on what no step sees; that loss, the start's, and for how long nothing was gained."""

    best: T
    first: float
    """Loss of the start, nats."""
    falling: float
    """A loss that fell by less than this, in nats, stands still."""
    every: int
    """Steps between two looks."""
    used: int = 0
    """Steps made."""
    still: int = 0
    """Steps since it last fell."""

    def __post_init__(self) -> None:
        self.loss = self.first

    def judge(self, now: T, loss: float) -> bool:
        """Whether this is a gain. The best is kept, gain or not."""
        gained = loss < self.loss - self.falling
        self.still = 0 if gained else self.still + self.every
        if loss < self.loss:
            self.best, self.loss = now, loss
        return gained

    def looks(self, steps: int) -> bool:
        """Whether a look follows the step just made, of ``steps`` at most."""
        return self.used % self.every == 0 or self.used == steps


def draw_batch(items: Sequence[T], size: int, rng: random.Random) -> list[T]:
    """``size`` of the items, or all in an order by chance."""
    return rng.sample(list(items), min(size, len(items)))
