"""What every strategy shares: the registry, its context, the knockouts it lists, and their results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ConfigDict, Field

from obliteratus.core.registry import Registry
from obliteratus.core.results import Score
from obliteratus.core.settings import FrozenModel
from obliteratus.core.types import Plan, Subject
from obliteratus.inference.chat_template import Ids


@dataclass(frozen=True)
class StudyContext:
    """What a strategy may read."""

    subject: Subject
    texts: Ids
    """Token rows of the texts that the study measures on."""
    seed: int = 0


@dataclass(frozen=True)
class Knockout:
    """One part of the model that is knocked out."""

    strategy: str
    component: str
    """Its name for people, unique in a study: ``block 3 head 2``."""
    layer: int
    """The lowest block that it changes; −1 for the embeddings."""
    part: int
    """The number of the head, expert, neuron, chunk …; −1 if it is all of them."""
    size: int
    """Number of entries of writing matrices that are switched off."""
    plan: Plan
    control: bool = False
    """Whether it is a random control, as large as what it is a control of."""


Strategy = Callable[..., Iterator[Knockout]]
"""(context, **options) → knockouts, in the order in which they are shown."""

strategies: Registry[Strategy] = Registry("strategy")


class KnockoutResult(FrozenModel):
    """One line of a study's ``results.jsonl``. The first line is the baseline; its strategy and component are empty."""

    model_config = ConfigDict(ser_json_inf_nan="strings")  # JSON has no infinity; a broken model's perplexity may be

    strategy: str = ""
    component: str = ""
    layer: int = -1
    part: int = -1
    size: int = 0
    control: bool = False
    scores: Mapping[str, Score]
    """Scores of the model without the component, by metric."""
    change: Mapping[str, Score] = {}
    """Changes against the baseline by metric: ratios of perplexities, differences of shares, nats of KL.

    They are paired, so that the difficulty of a text or prompt cancels. Empty for the baseline.
    """
    differences: Mapping[str, tuple[float, ...]] = {}
    """Changes of each text, prompt or question against the baseline by metric, of losses in nats for perplexity.

    They are what all parts are tested on together. Empty for the baseline, and in results of earlier versions.
    """
    seconds: float = 0.0
    answers: tuple[Mapping[str, Any], ...] = Field((), exclude=True)
    """Judged answers before and after, as ``answers.jsonl`` keeps them."""
