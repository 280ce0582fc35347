"""VERIFY: held-out prompts, before and after. Each scorer is one registered function; importing registers them."""

from obliteratus.verify import accuracy, drift, first_token, fluency, refusal, tokens
from obliteratus.verify.steps import Context, Measured, scorers, verify

__all__ = [
    "Context",
    "Measured",
    "accuracy",
    "drift",
    "first_token",
    "fluency",
    "refusal",
    "scorers",
    "tokens",
    "verify",
]
