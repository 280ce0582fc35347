"""What every rung of the ladder of judges is given, and what it returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@dataclass(frozen=True)
class Answered:
    """A prompt and the answer to it."""

    prompt: str
    answer: str
    category: str = ""


@runtime_checkable  # tests check annotations when functions are called
class Rung(Protocol):
    """A judge besides the phrases, such as a classifier or another model."""

    def judge(self, answers: Sequence[Answered]) -> list[bool | None]:
        """Return for each answer whether it shows the behavior, or None where the rung gives no verdict."""
        ...
