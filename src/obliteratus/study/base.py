"""What every strategy shares: the registry, what it yields, and what a study keeps of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from obliteratus.registry import Registry
from obliteratus.results import Score
from obliteratus.settings import Frozen
from obliteratus.types import Plan


@dataclass(frozen=True)
class Spec:
    """One part of the model to be knocked out."""

    strategy: str
    component: str
    """Its name for people, unique in a study: ``block 3 head 2``."""
    layer: int
    """The lowest block that it changes; −1 for the embeddings."""
    part: int
    """Which of the block's parts: head, expert, chunk …; −1 where it is all of them."""
    size: int
    """Parameters that no longer do anything."""
    plan: Plan
    control: bool = False
    """Drawn at random, as large as what it is a control of."""


Strategy = Callable[..., Iterator[Spec]]
"""(subject, **options) → specs, in the order in which they are tried."""

strategies: Registry[Strategy] = Registry("strategy")


class Result(Frozen):
    """One line of a study's ``results.jsonl``. The first line is the baseline: strategy and component are empty."""

    strategy: str
    component: str
    layer: int
    part: int
    size: int
    control: bool = False
    scores: dict[str, Score]
    """By metric, of the model without the component."""
    change: dict[str, Score]
    """By metric, against the baseline: a ratio for perplexities, a difference for shares and KLs; paired, so that
    what is hard about a text or prompt cancels. Empty for the baseline."""
    seconds: float

    def row(self) -> dict[str, Any]:
        """Plain values for tables: without intervals."""
        plain = self.model_dump(exclude={"scores", "change", "seconds"})
        return plain | {name: score.value for name, score in self.scores.items()}
