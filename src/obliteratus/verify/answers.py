"""The judged answers of a run, a search, a study or a comparison: ``answers.jsonl``, one line a prompt."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from obliteratus.core.errors import UserError
from obliteratus.core.registry import explain_validation_error
from obliteratus.core.run_folder import require_file, write_atomic
from obliteratus.judge.judge import Verdict
from obliteratus.verify.scoring import Measurement

FILE = "answers.jsonl"
STATE_KEYS, PROMPT_KEYS = ("answer", "verdict", "rungs"), ("prompt", "group", "category")


@dataclass(frozen=True)
class JudgedAnswer:
    """One answer, and the verdicts that were given on it."""

    id: str
    """Line and state, such as ``12 after``."""
    group: str
    prompt: str
    category: str
    answer: str
    verdict: str
    rungs: Mapping[str, str | None] = field(default_factory=dict)
    """By rung; None where it gave none."""

    @property
    def state(self) -> str:
        """``before`` or ``after``."""
        return self.id.split()[1]


def write_answers(before: Measurement | None, after: Measurement, folder: Path) -> None:
    """Write `FILE`: prompt, group and category of each judged prompt, with answers and verdicts before and after.

    before: None for a model that is not compared. Nothing is written if no answers were judged.
    """
    states = {} if before is None else {"before": before.records}
    write_states(states | {"after": after.records}, folder / FILE)


def write_states(states: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Write the file of answers in any number of states. Nothing is written if no answers were judged."""
    if text := "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in pair_answers(states)):
        write_atomic(path, text)


def pair_answers(states: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[dict[str, Any]]:
    """Yield an entry per prompt with what is known of it in each state.

    states: by their names, records of the same prompts in the same order. Those without a verdict are left out.
    """
    judged = [[record for record in records if "verdict" in record] for records in states.values()]
    for records in zip(*judged, strict=True):
        yield {key: records[0][key] for key in PROMPT_KEYS} | {
            state: {key: record[key] for key in STATE_KEYS} for state, record in zip(states, records, strict=True)
        }


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file with one a line, or none if there is no such file."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return [json.loads(line) for line in text.split("\n") if line]  # an answer may hold other signs that end a line


def read_answers(folder: Path) -> list[JudgedAnswer]:
    """Return the answers of a run's folder. Raises UserError if there are none, or the file is damaged."""
    path = require_file(folder, FILE)
    try:
        lines = path.read_bytes().decode().split("\n")  # an answer may hold other signs that end a line
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); restore it or run again") from error
    answers = []
    for number, text in enumerate(lines[:-1], 1):
        try:
            line = Line.model_validate_json(text)
        except ValidationError as error:
            why = explain_validation_error(error)[:120]
            raise UserError(f"{path}:{number}: this line is damaged ({why}); restore it or run again") from error
        answers += _split_states(number, line)
    if not answers:
        raise UserError(f"{path}: the file holds no answers; restore it or run again")
    return answers


class JudgedText(BaseModel):
    """An answer in one state, as the file keeps it."""

    answer: str
    verdict: Verdict
    rungs: dict[str, Verdict | None] = {}


class Line(BaseModel):
    """A line of the file."""

    prompt: str
    group: str
    category: str
    before: JudgedText | None = None
    after: JudgedText | None = None


def _split_states(number: int, line: Line) -> list[JudgedAnswer]:
    asked = {key: getattr(line, key) for key in PROMPT_KEYS}
    states = {"before": line.before, "after": line.after}
    return [JudgedAnswer(f"{number} {name}", **asked, **text.model_dump()) for name, text in states.items() if text]
