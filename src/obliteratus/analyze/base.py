"""What every analysis shares: the registry, what it is given, and what it must be able to say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from obliteratus.causal.interventions import FitContext
from obliteratus.core.errors import UserError
from obliteratus.core.progress import note
from obliteratus.core.registry import Registry
from obliteratus.core.settings import Step
from obliteratus.core.types import Activations, Directions, PromptSet

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # takes half a second to load, and few commands draw


@dataclass(frozen=True)
class AnalysisContext:
    """What all analyses of a model share: nothing is probed twice."""

    acts: Activations
    """Of the fit prompts, every prompt's rows kept."""
    directions: Directions
    lab: FitContext
    """The model and the fit prompts."""
    held: PromptSet
    """Search prompts: for what must be scored on prompts that nothing was fitted on."""


@runtime_checkable  # tests check annotations when functions are called
class Finding(Protocol):
    """An analysis' result: a frozen dataclass of tensors and numbers, with these three."""

    def numbers(self) -> dict[str, Any]:
        """What JSON can hold; every estimate with its interval or the number of prompts behind it."""
        ...

    def told(self) -> str:
        """One line for people."""
        ...

    def draw(self, figure: Figure) -> None:
        """A plot with labelled axes, on an empty figure."""
        ...


Analysis = Callable[..., Finding]
"""(ground, **options) → finding."""

analyses: Registry[Analysis] = Registry("analyze")


def analyze(ground: AnalysisContext, steps: Sequence[Step]) -> dict[str, Finding]:
    """Run analyses on one ground, in their order. Raises UserError for a name or option that does not exist."""
    found: dict[str, Finding] = {}
    for step in steps:
        found[step.use] = analyses[step.use].function(ground, **analyses.check(step.use, step.options))
    return found


def try_analyses(ground: AnalysisContext, steps: Sequence[Step]) -> tuple[dict[str, Finding], dict[str, str]]:
    """Findings, and the reasons of those that cannot work on this ground, which are noted."""
    found: dict[str, Finding] = {}
    unable: dict[str, str] = {}
    for step in steps:
        try:
            found |= analyze(ground, [step])
        except UserError as error:
            unable[step.use] = str(error)
            note("skipped", f"{step.use}: {error}")
    return found, unable
