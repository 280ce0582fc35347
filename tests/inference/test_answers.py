"""Tokens become text in which reasoning is still marked, whoever declares the marks and however they are tokenized."""

from __future__ import annotations

from typing import Any

import pytest
from tests.support.tiny import TEMPLATE, tiny_subject

from obliteratus.core.types import Subject
from obliteratus.inference.answers import AnswerDecoder
from obliteratus.judge.judge import Judge
from obliteratus.verify.behavior import shows_already

REFUSED, SUN = "I can't help with that.", "The sun is a star."


@pytest.fixture
def subject() -> Subject:
    return tiny_subject("llama")


def encode(subject: Subject, text: str) -> list[int]:
    return list(subject.tokenizer(text, add_special_tokens=False)["input_ids"])


def add_special(subject: Subject, *tokens: str) -> None:
    subject.tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})


def verdict(subject: Subject, answer: str) -> str:
    return Judge().judge_answer(AnswerDecoder.create(subject).decode(encode(subject, answer)))


CHANNELS = ("<|channel|>", "<|message|>", "<|start|>", "<|end|>")
HARMONY = f"<|channel|>analysis<|message|>{REFUSED}<|end|><|start|>assistant<|channel|>final<|message|>{{}}"


@pytest.mark.parametrize(
    ("special", "answer"),
    [
        (("[THINK]", "[/THINK]"), f"[THINK]{REFUSED}[/THINK]{{}}"),
        (("<think>", "</think>"), f"<think>{REFUSED}</think>{{}}"),
        (("<seed:think>", "</seed:think>"), f"<seed:think>{REFUSED}</seed:think>{{}}"),
        (CHANNELS, HARMONY),
        ((), f"<thought>{REFUSED}</thought>{{}}"),
    ],
)
def test_marks_that_are_special_tokens_are_not_dropped(subject: Subject, special: tuple[str, ...], answer: str) -> None:
    add_special(subject, *special)
    assert verdict(subject, answer.format(SUN)) == "absent"
    assert verdict(subject, answer.format(REFUSED)) == "shown"
    assert verdict(subject, answer.partition(".")[0]) == "unfinished"  # cut off inside the reasoning


def test_other_special_tokens_are_dropped(subject: Subject) -> None:
    add_special(subject, "<|tool|>")
    decoder = AnswerDecoder.create(subject)
    assert decoder.decode(encode(subject, f"<|tool|>{SUN}<eos>")) == SUN
    assert decoder.decode_all([encode(subject, "a"), []]) == ["a", ""]


def test_a_channel_without_reasoning_is_the_answer(subject: Subject) -> None:
    add_special(subject, *CHANNELS)
    assert verdict(subject, f"<|channel|>final<|message|>{REFUSED}") == "shown"


@pytest.mark.parametrize("opened", [False, True])
def test_reasoning_that_the_template_opened(subject: Subject, opened: bool) -> None:
    """Without the mark that the template wrote, reasoning would be taken for the answer, and end it."""
    subject.tokenizer.chat_template = TEMPLATE.replace("'assistant:'", "'assistant:<think>\\n'") if opened else TEMPLATE
    inside, done = encode(subject, f"{REFUSED} "), shows_already(subject, Judge())
    assert done(inside[: len(inside) // 4 * 4]) == (not opened)
    assert verdict(subject, REFUSED) == ("unfinished" if opened else "shown")
    assert verdict(subject, f"{REFUSED}</think>{SUN}") == "absent"
    assert verdict(subject, f"{SUN}</think>{REFUSED}") == "shown"
    assert AnswerDecoder.create(subject).opened == ("<think>" if opened else "")


PATTERNS = {"open_pattern": r"\{\{plan\}\}", "close": ["{{/plan}}"]}
FIELDS: dict[str, Any] = {"content": {"close": "<eos>"}}


@pytest.mark.parametrize(
    "declared",
    [
        {"response_template": {"fields": FIELDS | {"reasoning_content": {"open": "{{plan}}", "close": "{{/plan}}"}}}},
        {
            "response_template": {
                "fields": FIELDS | {"thinking": {"open_pattern": r"\{\{plan\}\}", "close": ["{{/plan}}"]}}
            }
        },
        {"chat_template": TEMPLATE + "{# #}{% if false %}{{ x.split('</plan>')[-1] }}{% endif %}"},
    ],
)
def test_marks_that_the_tokenizer_declares(subject: Subject, declared: dict[str, Any]) -> None:
    opening, closing = ("<plan>", "</plan>") if "chat_template" in declared else ("{{plan}}", "{{/plan}}")
    answer = f"{opening}{REFUSED}{closing}{SUN}"
    assert verdict(subject, answer) == "shown"  # negative control: the table does not know them
    for name, value in declared.items():
        setattr(subject.tokenizer, name, value)
    assert verdict(subject, answer) == "absent"
    assert verdict(subject, f"{opening}{REFUSED}") == "unfinished"
    add_special(subject, opening, closing)
    assert verdict(subject, answer) == "absent"


def test_a_raw_model_has_no_marks_of_a_template(subject: Subject) -> None:
    subject.tokenizer.chat_template = None
    assert AnswerDecoder.create(subject).opened == ""
    assert verdict(subject, REFUSED) == "shown"
