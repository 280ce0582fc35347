"""What every strategy shares: the registry, what it is given, what it yields, and what a study keeps of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from pydantic import ConfigDict

from obliteratus.core.registry import Registry
from obliteratus.core.results import Score
from obliteratus.core.settings import FrozenModel
from obliteratus.core.types import Plan, Subject
from obliteratus.inference.chat_template import Ids


@dataclass(frozen=True)
class StudyContext:
    """What a strategy may look at."""

    subject: Subject
    texts: Ids
    """Token rows of the study's texts: what scores are taken on."""
    seed: int = 0


@dataclass(frozen=True)
class Knockout:
    """One part of the model to be knocked out."""

    strategy: str
    component: str
    """Its name for people, unique in a study: ``block 3 head 2``."""
    layer: int
    """The lowest block that it changes; −1 for the embeddings."""
    part: int
    """Which of the block's parts: head, expert, neuron, chunk …; −1 where it is all of them."""
    size: int
    """Entries of writing matrices that no longer write."""
    plan: Plan
    control: bool = False
    """Drawn at random, as large as what it is a control of."""


Strategy = Callable[..., Iterator[Knockout]]
"""(ground, **options) → specs, in the order in which they are shown."""

strategies: Registry[Strategy] = Registry("strategy")


class KnockoutResult(FrozenModel):
    """One line of a study's ``results.jsonl``. The first line is the baseline: strategy and component are empty."""

    model_config = ConfigDict(ser_json_inf_nan="strings")  # JSON has no infinity: a broken model's perplexity may be

    strategy: str = ""
    component: str = ""
    layer: int = -1
    part: int = -1
    size: int = 0
    control: bool = False
    scores: Mapping[str, Score]
    """By metric, of the model without the component."""
    change: Mapping[str, Score] = {}
    """By metric, against the baseline: a ratio for perplexities, a difference for shares, nats for KLs; paired, so that
    what is hard about a text or prompt cancels. Empty for the baseline."""
    seconds: float = 0.0
