"""Prompts to token ids: chat templates, their thinking modes, and prompts too long for the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from obliteratus.core.errors import UserError
from obliteratus.core.types import Prompt, Subject

Ids = list[list[int]]


def render_prompts(subject: Subject, prompts: Sequence[Prompt], reserve: int = 0) -> Ids:
    """Token ids of each prompt, ready for its answer.

    With a chat template: rendered once, tokenised without adding specials again (no double BOS). Without one:
    the raw text with the tokenizer's own specials. ``reserve``: tokens kept free for the answer. A prompt that
    does not fit into the context is cut at the end of its user text, never in the template's suffix.
    """
    ids = _tokenise(subject, prompts)
    limit = context_length(subject) - reserve
    for i, row in enumerate(ids):
        if len(row) > limit:
            ids[i] = _shortened(subject, prompts[i], len(row) - limit, limit)
    return ids


def context_length(subject: Subject) -> int:
    """Longest sequence in tokens that the model's positions allow."""
    config = subject.model.config.get_text_config()
    return int(config.max_position_embeddings)


def has_template(subject: Subject) -> bool:
    """Whether prompts are rendered as chat turns, or raw."""
    return subject.tokenizer.chat_template is not None


def _tokenise(subject: Subject, prompts: Sequence[Prompt]) -> Ids:
    if not has_template(subject):
        texts = [f"{p.system}\n\n{p.text}" if p.system else p.text for p in prompts]
        return [list(row) for row in subject.tokenizer(texts)["input_ids"]]
    turns = [_turns(p) for p in prompts]
    options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True}
    if "enable_thinking" in subject.tokenizer.chat_template:
        options["enable_thinking"] = subject.thinking
    texts = subject.tokenizer.apply_chat_template(turns, **options)
    return [list(row) for row in subject.tokenizer(texts, add_special_tokens=False)["input_ids"]]


def _turns(prompt: Prompt) -> list[dict[str, str]]:
    user = {"role": "user", "content": prompt.text}
    return [{"role": "system", "content": prompt.system}, user] if prompt.system else [user]


def _shortened(subject: Subject, prompt: Prompt, excess: int, limit: int) -> list[int]:
    words = subject.tokenizer(prompt.text, add_special_tokens=False)["input_ids"]
    while excess < len(words):
        text = subject.tokenizer.decode(words[: len(words) - excess])
        row = _tokenise(subject, [Prompt(text, system=prompt.system)])[0]
        if len(row) <= limit:
            return row
        excess += len(row) - limit  # cutting can split a token in two: cut what is still too much
    raise UserError(
        f"prompt '{prompt.text[:40]}…': template and system turn alone exceed the model's context of "
        f"{context_length(subject)} tokens; shorten the system turn or the answers"
    )
