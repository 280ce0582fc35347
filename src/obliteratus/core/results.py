"""What a run measured and did."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field

from obliteratus.core.settings import FrozenModel, Recipe


class Score(FrozenModel):
    """A measured number, never without its interval and sample size."""

    model_config = ConfigDict(ser_json_inf_nan="strings")  # JSON has no infinity; a broken model's perplexity may be

    value: float
    low: float
    high: float
    """95 % interval."""
    n: int
    unit: str


class Run(FrozenModel):
    """What was done and what came of it: `run.json`. Report, card and `--json` read this and nothing else."""

    version: int = 1
    status: Literal["running", "done"] = "running"
    recipe: Recipe
    source: dict[str, str]
    prompts: dict[str, Any]
    """Digest and number of prompts by split and group, thinking mode, prompt files."""
    before: dict[str, Score] = Field(default_factory=dict)
    after: dict[str, Score] = Field(default_factory=dict)
    coverage: dict[str, Any] = Field(default_factory=dict)
    passes: tuple[dict[str, Any], ...] = ()
    """What each pass found and did."""
    search: dict[str, Any] = Field(default_factory=dict)
    """Of a search: the study, its trials, the front, and which member this is."""
    advice: dict[str, Any] = Field(default_factory=dict)
    """What was measured before the recipe was settled, and each decision with its number."""
    seconds: dict[str, float] = Field(default_factory=dict)
    saved: dict[str, Any] = Field(default_factory=dict)
    """Form, files and the outcome of the re-score."""
    versions: dict[str, str] = Field(default_factory=dict)
