"""Multiple choice: whether the right answer is the likeliest of those offered."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from obliteratus.core.cost import Cost, amount, number
from obliteratus.core.errors import UserError
from obliteratus.core.registry import explain_validation_error
from obliteratus.core.shapes import Float
from obliteratus.core.types import Prompt, Subject
from obliteratus.inference.chat_template import Ids, has_template, render_prompts
from obliteratus.inference.token_losses import token_losses
from obliteratus.verify.intervals import paired_difference, wilson_rate
from obliteratus.verify.steps import Measurement, ScorerContext, scorers


class Question(BaseModel):
    """One line of a labelled file."""

    model_config = ConfigDict(frozen=True)
    prompt: str = Field(min_length=1)
    choices: tuple[str, ...] = Field(min_length=2)
    answer: int = Field(ge=0)
    """Index of the right choice."""


@dataclass(frozen=True)
class RenderedChoices:
    """All choices of some questions behind their prompts, one row each."""

    ids: Ids
    lengths: tuple[int, ...]
    """Tokens of each row that are its choice: the last ones."""
    choices: tuple[int, ...]
    """Rows of each question."""
    answers: tuple[int, ...]

    def hits(self, losses: Sequence[Tensor]) -> Float[Tensor, " questions"]:
        """1 where the right choice is the likeliest, summed over its tokens, else 0. losses: of each row's tokens."""
        sums = torch.stack([loss[-n:].double().sum() for loss, n in zip(losses, self.lengths, strict=True)])
        best = [int(part.argmin()) for part in sums.split(list(self.choices))]
        return torch.tensor([float(b == a) for b, a in zip(best, self.answers, strict=True)])


def load_questions(source: str | Path) -> list[Question]:
    """The questions of a JSONL file: ``prompt``, ``choices`` and ``answer``, the right one's index; other keys are
    ignored. Raises UserError naming file and line."""
    if not str(source):
        raise UserError("accuracy: needs questions; give the step labelled, JSONL of prompt, choices, answer")
    path = Path(source)
    if not path.is_file():
        raise UserError(f"{path}: no such labelled file; give JSONL of prompt, choices, answer")
    found = [_question(line, f"{path}:{n}") for n, line in enumerate(path.read_text().splitlines(), 1) if line.strip()]
    if not found:
        raise UserError(f"{path}: the labelled file is empty; give at least one question a line")
    return found


def _question(line: str, where: str) -> Question:
    try:
        made = Question(**json.loads(line))
    except (json.JSONDecodeError, TypeError) as error:
        raise UserError(f"{where}: not a JSON object; one question a line") from error
    except ValidationError as error:
        raise UserError(f"{where}: {explain_validation_error(error)}") from error
    if made.answer >= len(made.choices):
        raise UserError(f"{where}: answer {made.answer} names none of {len(made.choices)} choices; they count from 0")
    return made


def render_choices(subject: Subject, asked: Sequence[Question]) -> RenderedChoices:
    """Choices behind the rendered prompts: as an answer in chat models, behind a space in others."""
    gap = "" if has_template(subject) else " "
    texts = [gap + choice for q in asked for choice in q.choices]
    tails = [list(row) for row in subject.tokenizer(texts, add_special_tokens=False)["input_ids"]]
    prompts = render_prompts(subject, [Prompt(q.prompt) for q in asked], reserve=max(map(len, tails)))
    counts = [len(q.choices) for q in asked]
    ends = list(accumulate(counts, initial=0))
    ids = [prompts[i] + tail for i, n in enumerate(counts) for tail in tails[ends[i] : ends[i] + n]]
    return RenderedChoices(ids, tuple(map(len, tails)), tuple(counts), tuple(q.answer for q in asked))


def _cost(labelled: str) -> Cost:
    """A text for each choice; by name as long as no file is given."""
    known = number(sum(len(q.choices) for q in load_questions(labelled))) if labelled else amount("N_labelled")
    return Cost(texts=known)


@scorers.register("accuracy", cost=lambda options: _cost(options["labelled"]))
def accuracy(context: ScorerContext, *, labelled: str = "") -> Measurement:
    """Share of multiple-choice questions of which the right choice is the likeliest behind the prompt.

    labelled: JSONL of ``prompt``, ``choices`` and ``answer`` (the right one's index). A choice's likelihood is summed
    over its tokens. UserError where none is given.
    """
    rows = render_choices(context.subject, load_questions(labelled))
    hits = rows.hits(token_losses(context.subject, rows.ids, title="VERIFY accuracy"))
    scores = {"accuracy": wilson_rate(int(hits.sum()), len(hits))}
    if context.before is not None:
        scores["accuracy.change"] = paired_difference(hits, context.before.tensors["hits.accuracy"], "share")
    return Measurement(scores, tensors={"hits.accuracy": hits})
