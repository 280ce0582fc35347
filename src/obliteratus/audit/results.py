"""What an audit returns: curves and costs, and the measurements that vary the edit or the prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ConfigDict, Field

from obliteratus.audit.asked import Asked
from obliteratus.audit.doses import Curve, Dose, Matched
from obliteratus.audit.removal_cost import HALF, RemovalCost
from obliteratus.audit.settings import AuditSettings
from obliteratus.core.results import Score
from obliteratus.core.settings import FrozenModel
from obliteratus.verify.presence import Presence

ROOM = 2.0  # controls, blocks and few examples are measured at so many times the cost of removal


class Repair(FrozenModel):
    """What the analysis `repair` found."""

    summary: str
    found: bool
    numbers: dict[str, Any]


class MatchedEdits(FrozenModel):
    """Edits at one KL."""

    kl: float
    """Nats: the cost of removal times `ROOM`, or what comes closest."""
    edits: tuple[Matched, ...]
    failed: dict[str, str] = Field(default_factory=dict)
    """By name, why an edit could not be made."""


class Perplexities(FrozenModel):
    """By method and goal, the ratio of perplexities on plain prose, edited ÷ unedited, at the cost of removal."""

    model_config = ConfigDict(ser_json_inf_nan="strings")  # JSON has no infinity

    ratios: dict[str, dict[str, Score]]


class AskedSet(FrozenModel):
    """Prompts asked otherwise."""

    asked: tuple[Asked, ...]


@dataclass(frozen=True)
class AuditReport:
    """What an audit found. Without the behavior there is nothing but `presence`, and nothing is claimed."""

    behavior: str
    settings: AuditSettings
    presence: Presence
    unedited: Dose | None = None
    curves: Mapping[str, Curve] = field(default_factory=dict)
    costs: Mapping[str, Sequence[RemovalCost]] = field(default_factory=dict)
    """By method, for each of `GOALS`."""
    least: Sequence[RemovalCost] = ()
    """Over all methods, for each of `GOALS`, with the interval over prompts and fits."""
    perplexity: Perplexities | None = None
    seeds: Mapping[str, Curve] = field(default_factory=dict)
    """Curves of one method: on all fit prompts, and on random halves of them."""
    directions: Mapping[str, Curve] = field(default_factory=dict)
    ratios: Mapping[str, Score | None] = field(default_factory=dict)
    """By number of directions, the cost of removal relative to one direction's."""
    controls: MatchedEdits | None = None
    blocks: MatchedEdits | None = None
    examples: MatchedEdits | None = None
    repair: Repair | None = None
    rewordings: AskedSet | None = None
    benign: AskedSet | None = None
    base_method: str = ""
    """The cheap method that directions, blocks, examples and seeds vary."""
    skipped: Mapping[str, str] = field(default_factory=dict)
    passes: int = 0
    """Forward passes of one prompt or answer token, at most."""
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def shows_behavior(self) -> bool:
        """Whether there was anything to audit."""
        return not self.presence.against

    def cost_to(self, goal: float) -> RemovalCost | None:
        """Return the least cost of one of `GOALS`; None without the behavior."""
        return next((cost for cost in self.least if cost.goal == goal), None)

    @property
    def cost(self) -> RemovalCost | None:
        """The number to compare between models: the least KL, in nats, at which one half of the behavior is left."""
        return self.cost_to(HALF)
