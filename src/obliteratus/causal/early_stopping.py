"""Early stopping and batches, for everything that is fitted by gradient steps."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass
class EarlyStopping(Generic[T]):
    """The state with the least held-out loss so far, and for how many steps that loss has not improved."""

    best: T
    start_loss: float
    """Held-out loss of the start, in nats."""
    min_improvement: float
    """A loss that fell by less than this, in nats, has not improved."""
    check_every: int
    """Steps between two evaluations of the held-out loss."""
    steps: int = 0
    """Steps taken."""
    stalled_steps: int = 0
    """Steps since the loss last improved."""

    def __post_init__(self) -> None:
        self.loss = self.start_loss

    def update(self, state: T, loss: float) -> bool:
        """Record a state and its held-out loss; return whether the loss improved by enough."""
        improved = loss < self.loss - self.min_improvement
        self.stalled_steps = 0 if improved else self.stalled_steps + self.check_every
        if loss < self.loss:
            self.best, self.loss = state, loss
        return improved

    def should_check(self, max_steps: int) -> bool:
        """Return whether to evaluate the held-out loss after the step just taken."""
        return self.steps % self.check_every == 0 or self.steps == max_steps


def draw_batch(items: Sequence[T], size: int, rng: random.Random) -> list[T]:
    """Draw ``size`` of the items without replacement, or all of them in random order if there are fewer."""
    return rng.sample(list(items), min(size, len(items)))
