"""VERIFY: held-out prompts, before and after. Each scorer is one registered function; importing registers them."""

from obliteratus.verify import accuracy, drift, first_token, fluency, refusal, tokens
from obliteratus.verify.steps import Measurement, ScorerContext, measure, scorers

__all__ = [
    "Measurement",
    "ScorerContext",
    "accuracy",
    "drift",
    "first_token",
    "fluency",
    "measure",
    "refusal",
    "scorers",
    "tokens",
]
