"""What all analyses share: registry, input, the protocol of their results, and the choice of a direction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Protocol, runtime_checkable

from pydantic import Field
from torch import Tensor

from obliteratus.core.errors import UserError
from obliteratus.core.progress import note
from obliteratus.core.registry import Registry
from obliteratus.core.settings import Step
from obliteratus.core.shapes import Float
from obliteratus.core.types import Activations, Directions, PromptSet, Subject
from obliteratus.judge.judge import Judge
from obliteratus.prompts import pick_evenly

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # takes half a second to load, and few commands draw

GROUPS = ("target", "control")
Stream = Annotated[int, Field(ge=0)] | None
"""A stream index; None stands for the stream whose directions have the highest score."""


@dataclass(frozen=True)
class AnalysisContext:
    """What every analysis of a model is given. Activations are probed once for all analyses."""

    activations: Activations
    """Activations of ``prompts``, with the rows of every prompt kept."""
    directions: Directions
    subject: Subject
    prompts: PromptSet
    """The fit prompts."""
    held_out: PromptSet
    """The search prompts, for scores on prompts that nothing was fitted on."""
    judge: Judge = field(default_factory=Judge)
    """Says which answers show the behavior. By default it looks for refusals."""


@runtime_checkable  # tests check annotations when functions are called
class Finding(Protocol):
    """The result of an analysis: a frozen dataclass of tensors and numbers with these three methods."""

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers as JSON types, every estimate with its interval or the number of prompts behind it."""
        ...

    def summary(self) -> str:
        """Return one line of text for people."""
        ...

    def draw(self, figure: Figure) -> None:
        """Draw a plot with labeled axes on an empty figure."""
        ...


Analysis = Callable[..., Finding]
"""(context, **options) → finding."""

analyses: Registry[Analysis] = Registry(
    "analyze", renamed={"certificate.standardise": "standardize", "lens.random": "draws"}
)


def analyze(context: AnalysisContext, steps: Sequence[Step]) -> dict[str, Finding]:
    """Run the analyses in their order and return the findings by name.

    Raises UserError for an unknown analysis or option, and where an analysis cannot work on these prompts.
    """
    findings: dict[str, Finding] = {}
    for step in steps:
        findings[step.use] = analyses[step.use].function(context, **analyses.check(step.use, step.options))
    return findings


def try_analyses(context: AnalysisContext, steps: Sequence[Step]) -> tuple[dict[str, Finding], dict[str, str]]:
    """Run the analyses and return the findings, and by name the reason of each one that raised a UserError."""
    findings: dict[str, Finding] = {}
    failures: dict[str, str] = {}
    for step in steps:
        try:
            findings |= analyze(context, [step])
        except UserError as error:
            failures[step.use] = str(error)
            note("skipped", f"{step.use}: {error}")
    return findings, failures


@dataclass(frozen=True)
class Aim:
    """The direction that an analysis measures along."""

    stream: int
    vector: Float[Tensor, " width"]
    """Unit vector."""


def choose_direction(context: AnalysisContext, stream: int | None, name: str) -> Aim:
    """Return the first direction of a stream; without a stream, that of the stream with the highest score.

    name: the analysis, for the error message. Raises UserError where the stream does not exist or has no direction.
    """
    directions = context.directions
    index = int(directions.score.argmax()) if stream is None else stream
    if index >= len(directions.score) or not bool(directions.basis[index, 0].any()):
        last = len(directions.score) - 1
        raise UserError(f"analysis '{name}': stream {index} of 0 to {last} has no direction; give another stream")
    return Aim(index, directions.basis[index, 0])


def subsample(prompts: PromptSet, most: int) -> PromptSet:
    """Return at most ``most`` target and ``most`` control prompts, evenly spaced."""
    return PromptSet({g: tuple(pick_evenly(prompts[g], most)) for g in GROUPS})
