"""VERIFY: scores of a model on held-out prompts, before and after an edit.

Each scorer is one registered function; importing this package registers them all. May import core, weights, summon,
inference, judge, prompts, excise and benchmark.
"""

from obliteratus.verify import (
    accuracy,
    behavior,
    benchmark,
    continuations,
    drift,
    first_token,
    fluency,
    relevance,
    style,
)
from obliteratus.verify.before_and_after import measure_before_and_after
from obliteratus.verify.scoring import ItemValues, Measurement, ScorerContext, measure, scorers

__all__ = [
    "ItemValues",
    "Measurement",
    "ScorerContext",
    "accuracy",
    "behavior",
    "benchmark",
    "continuations",
    "drift",
    "first_token",
    "fluency",
    "measure",
    "measure_before_and_after",
    "relevance",
    "scorers",
    "style",
]
