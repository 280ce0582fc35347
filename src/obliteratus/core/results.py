"""Define what a run records: scores, and everything else in run.json."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field

from obliteratus.core.settings import FrozenModel, Recipe


class Score(FrozenModel):
    """A measured number with its interval and sample size."""

    model_config = ConfigDict(
        ser_json_inf_nan="strings"
    )  # JSON has no infinity, which a broken model's perplexity may be

    value: float
    low: float
    """Lower end of the 95 % interval."""
    high: float
    """Upper end of the 95 % interval."""
    n: int
    unit: str


class Run(FrozenModel):
    """Record of a run, written to ``run.json``. Reports, model cards and ``--json`` read only this."""

    version: int = 1
    status: Literal["running", "done"] = "running"
    recipe: Recipe
    source: dict[str, str]
    prompts: dict[str, Any]
    """Digest, number of prompts by split and group, thinking mode and prompt files."""
    before: dict[str, Score] = Field(default_factory=dict)
    after: dict[str, Score] = Field(default_factory=dict)
    coverage: dict[str, Any] = Field(default_factory=dict)
    passes: tuple[dict[str, Any], ...] = ()
    """Findings, edits and seconds of each pass."""
    search: dict[str, Any] = Field(default_factory=dict)
    """For a search: the study, its trials, the front, and the member that was chosen."""
    judge: dict[str, Any] = Field(default_factory=dict)
    """The behavior, the openings of the model's own that count as it, who decides, and how the rungs agree."""
    advice: dict[str, Any] = Field(default_factory=dict)
    """For a method with analyses: each decision about the recipe with the measurement that it rests on."""
    seconds: dict[str, float] = Field(default_factory=dict)
    saved: dict[str, Any] = Field(default_factory=dict)
    """Saved form, files with their SHA-256, and the result of scoring the reloaded model."""
    versions: dict[str, str] = Field(default_factory=dict)
