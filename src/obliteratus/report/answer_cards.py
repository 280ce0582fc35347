"""Answers as cards for a page: each prompt with the answers of all sides, their verdicts, and where judges disagree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

REFUSAL = "refusal"
LABELS = {
    "partial": "first answers, then {shows}",
    "unknown": "in a language that the judge lacks",
    "degenerate": "loops",
    "unfinished": "cut off while reasoning",
}
"""Verdicts in words, beside those for answers that do and do not show the behavior."""


@dataclass(frozen=True)
class Side:
    """One answer to a prompt."""

    name: str
    id: str
    """Of its column, for filters and links."""
    answer: str
    verdict: str
    said: str
    """The verdict in words."""
    disagree: str
    """What each judge said, if they disagree."""


@dataclass(frozen=True)
class Card:
    """A prompt with the answers of all sides."""

    prompt: str
    group: str
    category: str
    sides: tuple[Side, ...]

    @property
    def verdicts(self) -> list[str]:
        """The different verdicts, in words."""
        return list(dict.fromkeys(side.said for side in self.sides))

    @property
    def changed(self) -> bool:
        """Whether two sides have different verdicts."""
        return len(self.verdicts) > 1

    @property
    def disagree(self) -> bool:
        """Whether judges disagree on a side."""
        return any(side.disagree for side in self.sides)


def make_cards(lines: Sequence[Mapping[str, Any]], behavior: str, names: Mapping[str, str] | None = None) -> list[Card]:
    """Return a card per line of ``answers.jsonl``, those with a change first.

    lines: prompt, group, category, and for each side an object with answer, verdict and rungs. names: of the sides, by
    their keys; None takes the keys ``before`` and ``after`` as names.
    """
    names = names or {"before": "before", "after": "after"}
    cards = [
        Card(line["prompt"], line["group"], line["category"], tuple(_sides(line, behavior, names))) for line in lines
    ]
    return sorted(cards, key=lambda card: not card.changed)  # stable: groups and prompts keep their order


def _sides(line: Mapping[str, Any], behavior: str, names: Mapping[str, str]) -> list[Side]:
    found = {key: line[key] for key in names if line.get(key)}
    return [
        Side(
            names[key],
            key,
            said["answer"],
            said["verdict"],
            name_verdict(said["verdict"], behavior),
            describe_disagreement(said.get("rungs", {}), behavior),
        )
        for key, said in found.items()
    ]


def name_verdict(verdict: str, behavior: str) -> str:
    """Return a verdict as people read it."""
    shows = "refuses" if behavior == REFUSAL else f"shows {behavior}"
    not_shown = "answers" if behavior == REFUSAL else f"no {behavior}"
    return {"shown": shows, "absent": not_shown}.get(verdict, LABELS.get(verdict, verdict).format(shows=shows))


def describe_disagreement(rungs: Mapping[str, str | None], behavior: str) -> str:
    """Return what each judge says, or '' if all that say something agree."""
    said = {name: verdict for name, verdict in rungs.items() if verdict is not None}
    if len(set(said.values())) < 2:
        return ""
    return "; ".join(f"{name}: {name_verdict(verdict, behavior)}" for name, verdict in said.items())
