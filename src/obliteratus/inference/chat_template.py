"""Prompts to token ids: chat templates, their thinking modes, and prompts that exceed the model's context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from obliteratus.core.errors import UserError
from obliteratus.core.types import Prompt, Subject

Ids = list[list[int]]


def render_prompts(subject: Subject, prompts: Sequence[Prompt], reserve: int = 0) -> Ids:
    """Return the token ids of each prompt, ready for its answer.

    With a chat template, the prompt is rendered and tokenized without special tokens, so that BOS does not come twice.
    Without one, the raw text is tokenized with the tokenizer's own special tokens. reserve: tokens kept free for the
    answer. A prompt that does not fit into the context is cut at the end of its user text, never in the template.
    Raises UserError if the template and the system turn alone do not fit.
    """
    ids = _tokenize(subject, prompts)
    limit = context_length(subject) - reserve
    for i, row in enumerate(ids):
        if len(row) > limit:
            ids[i] = _shorten(subject, prompts[i], len(row) - limit, limit)
    return ids


def context_length(subject: Subject) -> int:
    """Return the longest sequence, in tokens, that the model's positions allow."""
    config = subject.model.config.get_text_config()
    return int(config.max_position_embeddings)


def has_template(subject: Subject) -> bool:
    """Return whether prompts are rendered as chat turns, and not as raw text."""
    return subject.tokenizer.chat_template is not None


def _tokenize(subject: Subject, prompts: Sequence[Prompt]) -> Ids:
    if not has_template(subject):
        texts = [f"{p.system}\n\n{p.text}" if p.system else p.text for p in prompts]
        return [list(row) for row in subject.tokenizer(texts)["input_ids"]]
    texts = render_texts(subject, prompts)
    return [list(row) for row in subject.tokenizer(texts, add_special_tokens=False)["input_ids"]]


def render_texts(subject: Subject, prompts: Sequence[Prompt]) -> list[str]:
    """Return each prompt rendered by the chat template, up to where the answer begins. Needs a template."""
    turns = [_chat_turns(p) for p in prompts]
    options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True}
    if "enable_thinking" in subject.tokenizer.chat_template:
        options["enable_thinking"] = subject.thinking
    return list(subject.tokenizer.apply_chat_template(turns, **options))


def _chat_turns(prompt: Prompt) -> list[dict[str, str]]:
    user = {"role": "user", "content": prompt.text}
    return [{"role": "system", "content": prompt.system}, user] if prompt.system else [user]


def _shorten(subject: Subject, prompt: Prompt, excess: int, limit: int) -> list[int]:
    tokens = subject.tokenizer(prompt.text, add_special_tokens=False)["input_ids"]
    while excess < len(tokens):
        text = subject.tokenizer.decode(tokens[: len(tokens) - excess])
        row = _tokenize(subject, [Prompt(text, system=prompt.system)])[0]
        if len(row) <= limit:
            return row
        excess += len(row) - limit  # cutting can split a token into more tokens, so cut what is still too much
    raise UserError(
        f"prompt '{prompt.text[:40]}…': template and system turn alone exceed the model's context of "
        f"{context_length(subject)} tokens; shorten the system turn or the answers"
    )
