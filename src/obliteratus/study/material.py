"""What a study measures on: texts as tokens, the report part of its prompts, labelled questions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from obliteratus.core.errors import UserError
from obliteratus.core.types import PromptSet, Subject
from obliteratus.inference.chat_template import Ids, context_length
from obliteratus.prompts import evenly_spaced, load_prompts, parts_checked, read_prompts
from obliteratus.study.base import strategies
from obliteratus.study.metrics import metrics
from obliteratus.study.settings import Study
from obliteratus.verify.accuracy import Question, load_questions
from obliteratus.verify.drift import paragraphs

T = TypeVar("T")
Material = tuple[Ids, PromptSet | None, list[Question]]


def check_study(made: Study) -> None:
    """All that can be checked without the model. Raises UserError for a strategy, metric or option that does not exist,
    and for metrics whose data is not there."""
    for registry, steps in ((strategies, made.strategies), (metrics, made.metrics)):
        for step in steps:
            registry.check(step.use, step.options)
    needs = {need for step in made.metrics for need in metrics[step.use].needs}
    if "prompts" in needs and not (made.data.target and made.data.control):
        raise UserError("study: its metrics need prompts; give --target and --control, or data.target and data.control")
    if "labelled" in needs and not made.data.labelled:
        raise UserError("study: accuracy needs questions; give data.labelled, JSONL of prompt, choices, answer")
    _sources(made)


def material(subject: Subject, made: Study) -> Material:
    """Texts of 2 to ``data.length`` tokens, prompts by group (None without), questions; at most ``data.samples`` of
    each."""
    texts, prompts, asked = _sources(made)
    limit = min(made.data.length, context_length(subject))
    rows = [list(row)[:limit] for row in subject.tokenizer(_some(texts, made))["input_ids"]]
    rows = [row for row in rows if len(row) > 1]  # a single token has no loss
    if not rows:
        raise UserError("study: no text of data.texts has two tokens; give longer ones")
    return rows, prompts, asked


def _sources(made: Study) -> tuple[list[str], PromptSet | None, list[Question]]:
    data = made.data
    plain = not data.texts or Path(data.texts).suffix in (".txt", ".md")
    texts = paragraphs(data.texts) if plain else [prompt.text for prompt in read_prompts(data.texts)]
    asked = _some(load_questions(data.labelled), made) if data.labelled else []
    if not (data.target and data.control):
        return texts, None, asked
    report = parts_checked(load_prompts(data.target, data.control), made.seed)[2]
    groups = {group: tuple(_some(members, made)) for group, members in report.groups.items()}
    return texts, PromptSet(groups), asked


def _some(members: Sequence[T], made: Study) -> list[T]:
    return [members[i] for i in evenly_spaced(len(members), made.data.samples)]
