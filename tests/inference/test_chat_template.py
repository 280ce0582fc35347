"""Prompts become token ids as the model expects them: one BOS, the template's suffix whole, nothing too long."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tests.support.tiny import BOS, TEMPLATE, tiny_subject

from obliteratus.core.chat import ChatFormat
from obliteratus.core.errors import UserError
from obliteratus.core.types import Prompt, Subject
from obliteratus.inference.chat_template import context_length, has_template, render_prompts

SUFFIX = "\nassistant:"
THINKING = TEMPLATE.replace(
    "{{ 'assistant:' }}",
    "{{ 'assistant:' }}{% if enable_thinking is defined and not enable_thinking %}{{ '<think></think>' }}{% endif %}",
)


@pytest.fixture
def subject() -> Subject:
    return tiny_subject("llama")


def texts(subject: Subject, prompts: list[Prompt], **options: Any) -> list[str]:
    return [subject.tokenizer.decode(row) for row in render_prompts(subject, prompts, **options)]


def with_bos(subject: Subject) -> None:
    """Make the tokenizer put a BOS before everything that it encodes with specials, as Llama's does."""
    from tokenizers.processors import TemplateProcessing

    subject.tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<bos> $A", None, [("<bos>", BOS)])
    assert subject.tokenizer("a")["input_ids"][0] == BOS


def test_the_template_as_it_stands(subject: Subject) -> None:
    assert texts(subject, [Prompt("hi")]) == ["<bos>user: hi" + SUFFIX]


def test_a_system_turn_only_where_there_is_one(subject: Subject) -> None:
    found = texts(subject, [Prompt("hi", system="be brief"), Prompt("hi")])
    assert found == ["<bos>system: be brief\nuser: hi" + SUFFIX, "<bos>user: hi" + SUFFIX]


def test_no_double_bos(subject: Subject) -> None:
    with_bos(subject)
    row = render_prompts(subject, [Prompt("hi")])[0]
    assert row.count(BOS) == 1
    assert row[0] == BOS


def test_without_a_template_the_text_is_raw(subject: Subject) -> None:
    with_bos(subject)
    subject.tokenizer.chat_template = None
    assert not has_template(subject)
    assert texts(subject, [Prompt("hi")]) == ["<bos>hi"]
    assert texts(subject, [Prompt("hi", system="be brief")]) == ["<bos>be brief\n\nhi"]


@pytest.mark.parametrize("thinking", [False, True])
def test_thinking_is_rendered_in_the_chosen_mode(subject: Subject, thinking: bool) -> None:
    subject.tokenizer.chat_template = THINKING
    (text,) = texts(replace(subject, chat=ChatFormat(thinking)), [Prompt("hi")])
    assert text.endswith("assistant:" if thinking else "<think></think>")


# --------------------------------------------------------------------------------------------- too long
@pytest.mark.parametrize("reserve", [0, 48])
@pytest.mark.parametrize("length", [200, 245, 300, 2000])
def test_a_long_prompt_is_cut_in_its_user_text(subject: Subject, length: int, reserve: int) -> None:
    user = "".join(chr(97 + i % 26) for i in range(length))
    row = render_prompts(subject, [Prompt(user), Prompt("short")], reserve)[0]
    text, limit = subject.tokenizer.decode(row), context_length(subject) - reserve
    assert text.endswith(SUFFIX)
    kept = text.removeprefix("<bos>user: ").removesuffix(SUFFIX)
    assert user.startswith(kept)
    fixed = len("X" + "user: " + SUFFIX)  # X for <bos>
    assert len(row) == min(fixed + length, limit)  # one token a byte: cut to the token, and not where it fits


@pytest.mark.parametrize("length", [60, 100, 500])
def test_characters_of_several_tokens(subject: Subject, length: int) -> None:
    row = render_prompts(subject, [Prompt("星" * length)])[0]
    assert len(row) <= context_length(subject)
    assert len(row) > context_length(subject) - 12 or length == 60  # at most some characters too few
    assert subject.tokenizer.decode(row).endswith(SUFFIX)


def test_a_raw_prompt_is_cut_too(subject: Subject) -> None:
    with_bos(subject)
    subject.tokenizer.chat_template = None
    row = render_prompts(subject, [Prompt("a" * 500)])[0]
    assert len(row) == context_length(subject)
    assert row[0] == BOS


def test_a_system_turn_beyond_the_context_is_an_error(subject: Subject) -> None:
    with pytest.raises(UserError, match="context of 256 tokens; shorten the system turn"):
        render_prompts(subject, [Prompt("hi", system="s" * 300)])
    with pytest.raises(UserError, match="context of 256"):
        render_prompts(subject, [Prompt("hi there")], reserve=250)
