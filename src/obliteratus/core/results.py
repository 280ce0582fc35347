"""Define what a run records: scores, and everything else in run.json."""

from __future__ import annotations

from collections.abc import Mapping
from math import isinf, isnan, nan
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, PlainSerializer

from obliteratus.core.settings import FrozenModel, Recipe
from obliteratus.core.views import Plottable


def _read_end(end: float | int | str | None) -> float:
    """Return NaN, and always the same object, for a missing end, so that scores without an interval are equal."""
    return nan if end is None or isnan(float(end)) else float(end)


def replace_infinities(value: Any) -> Any:
    """Return JSON types in which infinite numbers, of which JSON has none, are the text that pydantic writes for them.

    pydantic does so itself in `model_dump_json`, and not in ``model_dump(mode="json")``.
    """
    if isinstance(value, Mapping):
        return {key: replace_infinities(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [replace_infinities(inner) for inner in value]
    if isinstance(value, float) and isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return value


End = Annotated[float, BeforeValidator(_read_end), PlainSerializer(lambda end: None if isnan(end) else end)]


class Score(FrozenModel):
    """A measured number with its interval and sample size."""

    model_config = ConfigDict(
        ser_json_inf_nan="strings"
    )  # JSON has no infinity, which a broken model's perplexity may be

    value: float
    low: End
    """Lower end of the 95 % interval; NaN where the sample is too small for an interval that covers 95 %."""
    high: End
    """Upper end of the 95 % interval, or NaN. In JSON both are null then."""
    n: int
    unit: str

    @property
    def has_interval(self) -> bool:
        """Return whether there is an interval. Without one, no comparison with an end of it is true."""
        return not isnan(self.low) and not isnan(self.high)

    def __str__(self) -> str:
        """Return the value with its interval and sample size, such as ``96.9% (89.3–99.1%), n 64``."""
        factor, unit = (100.0, "%") if self.unit == "share" else (1.0, "")
        digits = 1 if self.unit in ("share", "perplexity", "tokens") else 3
        value, low, high = (f"{factor * x:.{digits}f}" for x in (self.value, self.low, self.high))
        named = "" if self.unit in ("share", "mean", "ratio") else f" {self.unit}"
        interval = f" ({low}–{high}{unit})" if self.has_interval else ""
        return f"{value}{unit}{named}{interval}, n {self.n}"

    def __repr__(self) -> str:
        return f"<Score: {self}>"


class Run(Plottable, FrozenModel):
    """Record of a run, written to ``run.json``. Reports, model cards and ``--json`` read only this."""

    version: int = 1
    status: Literal["running", "done"] = "running"
    recipe: Recipe
    source: dict[str, str]
    prompts: dict[str, Any]
    """Digest, number of prompts by split and group, how far apart the parts are (see `separation.Separation`), how they
    are rendered (see `chat.ChatFormat`), and prompt files."""
    before: dict[str, Score] = Field(default_factory=dict)
    after: dict[str, Score] = Field(default_factory=dict)
    change: dict[str, Score] = Field(default_factory=dict)
    """Changes, paired item by item: differences of shares and nats, ratios of perplexities."""
    presence: dict[str, Any] = Field(default_factory=dict)
    """How many fit prompts showed the behavior before the edit, how many were left out, and whether it was forced."""
    optimism: dict[str, Score] = Field(default_factory=dict)
    """If anything was chosen on search prompts: the edited model's rate on them, that on report prompts, and how much
    higher the second is."""
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

    def describe(self) -> str:
        """Return the method, the model, and the behavior's rate on target prompts before and after."""
        what = f"{self.recipe.name or 'a recipe'} on {self.source.get('id', 'a model')}"
        rate = f"{self.judge.get('behavior', 'refusal')}.target"
        rates = [f"{100 * scores[rate].value:.1f}%" for scores in (self.before, self.after) if rate in scores]
        return f"{what}, {rate} {' → '.join(rates)}" if rates else what
