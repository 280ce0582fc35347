"""A reporter that keeps what is noted."""

from __future__ import annotations

from obliteratus.core.progress import Reporter


class Notes(Reporter):
    """Notes as texts, "title: text"."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, title: str, text: str) -> None:
        self.texts.append(f"{title}: {text}")
