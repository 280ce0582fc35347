"""The data of a study: texts as tokens, the report part of its prompts, and multiple-choice questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from obliteratus.core.errors import UserError, unknown_name
from obliteratus.core.types import PromptSet, Subject
from obliteratus.inference.chat_template import Ids, context_length, encode_texts
from obliteratus.prompts import load_prompts, pick_evenly, read_prompts, split_prompts
from obliteratus.study.base import strategies
from obliteratus.study.settings import Study
from obliteratus.verify import scorers
from obliteratus.verify.drift import load_paragraphs
from obliteratus.verify.ladder import check_judge
from obliteratus.verify.questions import Question, load_questions

METRICS = {"perplexity": "texts", "behavior": "prompts", "first_token_kl": "prompts", "accuracy": "labeled"}
"""VERIFY's scorers that a study can use, and the part of its data that each reads."""

T = TypeVar("T")


@dataclass(frozen=True)
class StudyData:
    """What a study measures on."""

    texts: Ids
    """Token rows."""
    prompts: PromptSet | None
    questions: list[Question]


def check_study(study: Study) -> None:
    """Check all that can be checked without the model.

    Raises UserError for a strategy, metric or option that does not exist, and for metrics whose data is missing.
    """
    check_judge(study.judge)
    for step in study.strategies:
        strategies.check(step.use, step.options)
    for step in study.metrics:
        if step.use in scorers.renamed:
            scorers[step.use]  # names the new name
        if step.use not in METRICS:
            raise UserError(unknown_name("metric", step.use, METRICS))
        scorers.check(step.use, step.options)
        if options := {"texts", "labeled"} & step.options.keys():
            raise UserError(f"study: metric '{step.use}' takes its {min(options)} from data.{min(options)}; set that")
    read = {METRICS[step.use] for step in study.metrics}
    if "prompts" in read and not (study.data.target and study.data.control):
        raise UserError("study: its metrics need prompts; give --target and --control, or data.target and data.control")
    if "labeled" in read and not study.data.labeled:
        raise UserError("study: accuracy needs questions; give data.labeled, JSONL of prompt, choices, answer")
    _load_sources(study)


def load_data(subject: Subject, study: Study) -> StudyData:
    """Load texts of 2 to ``data.length`` tokens, prompts by group and questions, at most ``data.samples`` of each.

    Raises UserError if no text has two tokens.
    """
    texts, prompts, questions = _load_sources(study)
    limit = min(study.data.length, context_length(subject))
    rows = [row[:limit] for row in encode_texts(subject, _sample(texts, study), add_special_tokens=True)]
    rows = [row for row in rows if len(row) > 1]  # a single token has no loss
    if not rows:
        raise UserError("study: no text of data.texts has two tokens; give longer ones")
    return StudyData(rows, prompts, questions)


def _load_sources(study: Study) -> tuple[list[str], PromptSet | None, list[Question]]:
    data = study.data
    plain = not data.texts or Path(data.texts).suffix in (".txt", ".md")
    texts = load_paragraphs(data.texts) if plain else [prompt.text for prompt in read_prompts(data.texts, data.column)]
    questions = _sample(load_questions(data.labeled), study) if data.labeled else []
    if not (data.target and data.control):
        return texts, None, questions
    report = split_prompts(
        load_prompts(data.target, data.control, column=data.column), study.seed, split_by=study.split_by
    ).report
    groups = {group: tuple(_sample(members, study)) for group, members in report.groups.items()}
    return texts, PromptSet(groups), questions


def _sample(members: Sequence[T], study: Study) -> list[T]:
    return pick_evenly(members, study.data.samples)
