"""Users' patterns, which may backtrack without end, are given little time on an answer."""

from __future__ import annotations

from dataclasses import dataclass

import regex

from obliteratus.core.errors import UserError

# A pattern reads at most 400 characters at once, which takes a sane one less than a millisecond.
SECONDS = 0.5


@dataclass(frozen=True)
class TimedPattern:
    """A compiled pattern that raises UserError where it takes too long."""

    pattern: regex.Pattern[str]
    where: str
    """The file that the pattern comes from, for the error message."""

    def search(self, string: str, /) -> object:
        """Look anywhere in the text."""
        try:
            return self.pattern.search(string, timeout=SECONDS)
        except TimeoutError as error:
            raise self._too_slow(string) from error

    def match(self, string: str, /) -> object:
        """Look at the start of the text."""
        try:
            return self.pattern.match(string, timeout=SECONDS)
        except TimeoutError as error:
            raise self._too_slow(string) from error

    def _too_slow(self, text: str) -> UserError:
        return UserError(
            f"{self.where}: a pattern takes more than {SECONDS} s on '{text[:40]}…'; take out nested repeats such as "
            f"(a+)+, in {self.pattern.pattern[:60]!r}"
        )


def compile_with_limit(pattern: str, where: str) -> TimedPattern:
    """Return the pattern compiled. Raises regex.error if it is invalid."""
    return TimedPattern(regex.compile(pattern), where)
