"""Prompts to token ids: chat templates, their thinking modes, and prompts that exceed the model's context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from obliteratus.core.chat import Turn
from obliteratus.core.errors import UserError
from obliteratus.core.progress import note
from obliteratus.core.types import Prompt, Subject
from obliteratus.summon.chat_format import encode, find_template, read_traits, render_turns

Ids = list[list[int]]


def render_prompts(subject: Subject, prompts: Sequence[Prompt], reserve: int = 0) -> Ids:
    """Return the token ids of each prompt, ready for its answer.

    With a chat template, the prompt is rendered and tokenized without special tokens, so that BOS does not come twice.
    Without one, the raw text is tokenized with the tokenizer's own special tokens. reserve: tokens kept free for the
    answer. A prompt that does not fit into the context is cut at the end of its user text, never in the template.
    Raises UserError if the template and the system turn alone do not fit.
    """
    ids = tokenize_prompts(subject, prompts)
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
    return bool(subject.tokenizer.chat_template)


def tokenize_prompts(subject: Subject, prompts: Sequence[Prompt]) -> Ids:
    """Return the token ids of each prompt as `render_prompts` does, however long they are."""
    if not has_template(subject):
        texts = ["\n\n".join(filter(None, (p.system, *(t.content for t in p.history), p.text))) for p in prompts]
        return encode_texts(subject, texts, add_special_tokens=True)
    return encode_texts(subject, render_texts(subject, prompts))


def encode_texts(subject: Subject, texts: Sequence[str], add_special_tokens: bool = False) -> Ids:
    """Return the token ids of each text. Raises UserError if the model has no embedding for one of them."""
    ids = encode(subject.tokenizer, texts, add_special_tokens)
    rows = subject.model.get_input_embeddings().weight.shape[0]
    if (largest := max((max(row, default=0) for row in ids), default=0)) >= rows:
        token = subject.tokenizer.convert_ids_to_tokens(largest)
        raise UserError(
            f"{subject.source.id}: its tokenizer gives token {largest} ('{token}'), and its embedding has {rows} rows; "
            "the tokenizer belongs to another model"
        )
    return ids


def render_texts(subject: Subject, prompts: Sequence[Prompt]) -> list[str]:
    """Return each prompt rendered by the chat template, up to where the answer begins. Needs a template.

    A system turn that the template does not take is put before the first user turn. Raises UserError if the template
    cannot render the turns.
    """
    template = find_template(subject.tokenizer, subject.chat)
    traits = read_traits(subject.tokenizer, template)
    if not traits.takes_system and any(p.system for p in prompts):
        note("prompts", "the chat template takes no system turn: it is put before the first user turn")
    turns = [[turn._asdict() for turn in _list_turns(prompt, traits.takes_system)] for prompt in prompts]
    options = {traits.switch: subject.chat.thinking} if traits.switch else {}
    return render_turns(subject.tokenizer, template, turns, subject.chat.now, **options)


def _list_turns(prompt: Prompt, takes_system: bool) -> list[Turn]:
    turns = [*prompt.history, Turn("user", prompt.text)]
    if not prompt.system:
        return turns
    if takes_system:
        return [Turn("system", prompt.system), *turns]
    first = next(i for i, turn in enumerate(turns) if turn.role == "user")
    turns[first] = Turn("user", f"{prompt.system}\n\n{turns[first].content}")
    return turns


def find_answer_end(subject: Subject) -> tuple[int, ...]:
    """Return the tokens by which the chat template ends an answer; empty if it has no such mark, or there is none."""
    template = find_template(subject.tokenizer, subject.chat)
    return read_traits(subject.tokenizer, template).end if template else ()


def _shorten(subject: Subject, prompt: Prompt, excess: int, limit: int) -> list[int]:
    (tokens,) = encode(subject.tokenizer, [prompt.text])
    while excess < len(tokens):
        text = subject.tokenizer.decode(tokens[: len(tokens) - excess])
        row = tokenize_prompts(subject, [replace(prompt, text=text)])[0]
        if len(row) <= limit:
            return row
        excess += len(row) - limit  # cutting can split a token into more tokens, so cut what is still too much
    raise UserError(
        f"prompt '{prompt.text[:40]}…': template and system turn alone exceed the model's context of "
        f"{context_length(subject)} tokens; shorten the system turn or the answers"
    )
