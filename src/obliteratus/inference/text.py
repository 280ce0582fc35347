"""Answers of a model to prompts, as text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import overload

from obliteratus.core.errors import UserError
from obliteratus.core.types import Prompt, Subject
from obliteratus.inference import generate as decoding
from obliteratus.inference.answers import AnswerDecoder
from obliteratus.inference.chat_template import render_prompts

TOKENS = 64  # two or three sentences


@overload
def generate(subject: Subject, prompts: str | Prompt, tokens: int = TOKENS) -> str: ...  # type: ignore[overload-overlap]
@overload
def generate(subject: Subject, prompts: Iterable[str | Prompt], tokens: int = TOKENS) -> list[str]: ...
def generate(subject: Subject, prompts: str | Prompt | Iterable[str | Prompt], tokens: int = TOKENS) -> str | list[str]:
    """Return the greedy answer to a prompt, or those to several, of at most so many tokens.

    Prompts are rendered by the model's chat template. Reasoning stays in the text, between its marks. Raises UserError
    for what is no prompt, and for a prompt whose template does not fit into the context.

    >>> ob.generate(subject, "Tell me # about tides?", tokens=1)
    'I cannot help with that.'
    >>> with ob.applied(subject, plan):
    ...     ob.generate(subject, ["Tell me # about tides?", "Tell me about rings?"], tokens=4)
    ['Y', 'Y']
    """
    single = isinstance(prompts, str | Prompt)
    asked = [prompts] if isinstance(prompts, str | Prompt) else list(prompts)
    for prompt in asked:
        if not isinstance(prompt, str | Prompt):
            raise UserError(f"generate: {str(prompt)[:60]} is no prompt; give texts, or ob.Prompt for more than a text")
    if tokens < 1:
        raise UserError(f"generate: tokens={tokens}; give at least 1")
    if not asked:
        return []
    ids = render_prompts(subject, [Prompt(p) if isinstance(p, str) else p for p in asked], reserve=tokens)
    rows = decoding.generate(subject, ids, tokens)
    answers = AnswerDecoder.create(subject).decode_all(rows)
    return answers[0] if single else answers
