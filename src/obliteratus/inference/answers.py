"""Answers as text, in which reasoning stays marked: a judge must know what is the answer and what led to it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from obliteratus.core.types import Prompt, Subject
from obliteratus.inference.chat_template import Ids, has_template, render_texts
from obliteratus.judge.reasoning import MARK, OPENING, is_reasoning

CLOSING = OPENING.replace("<", "</")
# What transformers calls reasoning in a tokenizer's response template.
FIELDS = ("reasoning_content", "thinking", "reasoning")
# Chat templates drop the reasoning of earlier turns by splitting at its closing mark.
SPLIT = re.compile(r"""split\(\s*['"](</[\w:|-]+>|\[/\w+\])['"]""")


@dataclass(frozen=True)
class AnswerDecoder:
    """Turns tokens of answers into text for one model and template.

    Special tokens are dropped, except for those that mark reasoning. Marks that the tokenizer's response template or
    its chat template declares become ``<think>`` and ``</think>``; those of `judge.reasoning` stay as they are.
    """

    tokenizer: Any
    opening: re.Pattern[str] | None
    """Marks that the template declares, or None."""
    closing: re.Pattern[str] | None
    dropped: frozenset[int]
    """Special tokens that are no marks."""
    opened: str = ""
    """What every answer is preceded by: ``<think>`` if the template opens the reasoning itself."""

    @classmethod
    def create(cls, subject: Subject) -> AnswerDecoder:
        """Return the decoder of a model."""
        tokenizer = subject.tokenizer
        opening, closing = find_declared_marks(tokenizer)
        special = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
        marks = [pattern for pattern in (MARK, opening, closing) if pattern is not None]
        dropped = frozenset(int(id) for text, id in special if not any(m.search(text) for m in marks))
        decoder = cls(tokenizer, opening, closing, dropped)
        inside = is_reasoning(decoder.normalize(_generation_prompt(subject)))
        return cls(tokenizer, opening, closing, dropped, OPENING if inside else "")

    def decode(self, row: list[int]) -> str:
        """Return an answer's text, preceded by the opening mark if the template wrote it."""
        kept = [token for token in row if token not in self.dropped]
        return self.opened + self.normalize(self.tokenizer.decode(kept, skip_special_tokens=False))

    def decode_all(self, rows: Ids) -> list[str]:
        """Return the text of each answer."""
        return [self.decode(row) for row in rows]

    def normalize(self, text: str) -> str:
        """Return text with the common marks in place of those that the template declares."""
        for pattern, mark in ((self.opening, OPENING), (self.closing, CLOSING)):
            text = text if pattern is None else pattern.sub(mark, text)
        return text


def find_declared_marks(tokenizer: Any) -> tuple[re.Pattern[str] | None, re.Pattern[str] | None]:
    """Return the opening and closing marks of reasoning that a tokenizer declares, or None.

    They stand in its response template, and else in its chat template, which splits earlier turns at the closing mark.
    """
    fields = (tokenizer.response_template or {}).get("fields", {})
    for name in FIELDS:
        if name in fields:
            return _compile(fields[name], "open"), _compile(fields[name], "close")
    closings = sorted(set(SPLIT.findall(str(tokenizer.chat_template or ""))))
    if not closings:
        return None, None
    openings = [mark.replace("/", "", 1) for mark in closings]
    return tuple(re.compile("|".join(map(re.escape, marks))) for marks in (openings, closings))  # type: ignore[return-value]


def _compile(field: dict[str, Any], end: str) -> re.Pattern[str] | None:
    """Return the pattern of one end of a field, which is a literal, several, or a regular expression."""
    if f"{end}_pattern" in field:
        return re.compile(field[f"{end}_pattern"], re.DOTALL)
    literals = field.get(end)
    if not literals:
        return None
    return re.compile("|".join(map(re.escape, [literals] if isinstance(literals, str) else literals)))


def _generation_prompt(subject: Subject) -> str:
    """Return what the template writes after the user's turn."""
    if not has_template(subject):
        return ""
    turn = "What is the name of the river?"
    return render_texts(subject, [Prompt(turn)])[0].rpartition(turn)[2]
