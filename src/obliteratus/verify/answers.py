"""The answers of a run, kept beside its record: ``answers.jsonl``, one line a prompt with both answers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from obliteratus.core.errors import UserError
from obliteratus.core.run_folder import write_atomic
from obliteratus.verify.scoring import Measurement

FILE = "answers.jsonl"
STATES = ("before", "after")


@dataclass(frozen=True)
class JudgedAnswer:
    """One answer of a run, and the verdict that was given then."""

    id: str
    """Line and state, such as ``12 after``."""
    group: str
    prompt: str
    answer: str
    verdict: str


def write_answers(before: Measurement, after: Measurement, folder: Path) -> None:
    """Write `FILE`: prompt, group and category of each judged prompt, with answer and verdict before and after.

    Nothing is written if no answers were judged.
    """
    lines = [json.dumps(line, ensure_ascii=False) for line in pair_answers(before.records, after.records)]
    if lines:
        write_atomic(folder / FILE, "\n".join(lines) + "\n")


def pair_answers(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield an entry per prompt. before, after: records of the same prompts in the same order."""
    first, second = ([r for r in records if "verdict" in r] for records in (before, after))
    for one, other in zip(first, second, strict=True):
        states = {name: {k: r[k] for k in ("answer", "verdict")} for name, r in zip(STATES, (one, other), strict=True)}
        yield {key: one[key] for key in ("prompt", "group", "category")} | states


def read_answers(folder: Path) -> list[JudgedAnswer]:
    """Return the answers of a run's folder. Raises UserError if there are none, or the file is damaged."""
    path = folder / FILE
    if not path.is_file():
        raise UserError(f"{folder}: there is no {FILE}; give the output folder of a run, such as run --out DIR")
    answers = []
    for number, text in enumerate(path.read_text().splitlines(), 1):
        try:
            line = json.loads(text)
            answers += [
                JudgedAnswer(f"{number} {state}", line["group"], line["prompt"], **line[state]) for state in STATES
            ]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UserError(f"{path}:{number}: this line is damaged ({error!r}); restore it or run again") from error
    return answers
