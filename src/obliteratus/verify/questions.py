"""Multiple-choice questions and the JSONL files they are read from."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from obliteratus.core.errors import UserError
from obliteratus.core.registry import explain_validation_error


class Question(BaseModel):
    """One line of a file of labeled questions."""

    model_config = ConfigDict(frozen=True)
    prompt: str = Field(min_length=1)
    choices: tuple[str, ...] = Field(min_length=2)
    answer: int = Field(ge=0)
    """Index of the right choice."""


def load_questions(source: str | Path) -> list[Question]:
    """Load the questions of a JSONL file with the keys ``prompt``, ``choices`` and ``answer``; others are ignored.

    Raises UserError that names file and line.
    """
    if not str(source):
        raise UserError("accuracy: needs questions; give the step labeled, JSONL of prompt, choices, answer")
    path = Path(source)
    if not path.is_file():
        raise UserError(f"{path}: no such labeled file; give JSONL of prompt, choices, answer")
    lines = enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
    questions = [_parse_question(line, f"{path}:{number}") for number, line in lines if line.strip()]
    if not questions:
        raise UserError(f"{path}: the labeled file is empty; give at least one question a line")
    return questions


def _parse_question(line: str, where: str) -> Question:
    try:
        question = Question(**json.loads(line))
    except (json.JSONDecodeError, TypeError) as error:
        raise UserError(f"{where}: not a JSON object; give one question per line") from error
    except ValidationError as error:
        raise UserError(f"{where}: {explain_validation_error(error)}") from error
    if question.answer >= len(question.choices):
        raise UserError(
            f"{where}: answer {question.answer} is not the index of any of the {len(question.choices)} choices, "
            "which count from 0"
        )
    return question
