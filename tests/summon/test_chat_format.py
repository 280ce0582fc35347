"""Templates as public models have them: several by name, no system role, a clock, an end of turn of their own."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from tests.support.notes import Notes
from tests.support.refuser import refuser
from tests.support.tiny import TEMPLATE, tiny_subject, tiny_tokenizer

from obliteratus.core.chat import ChatFormat, Turn
from obliteratus.core.errors import UserError
from obliteratus.core.progress import report_to
from obliteratus.core.types import Prompt, Subject
from obliteratus.inference.chat_template import find_answer_end, render_prompts
from obliteratus.inference.generate import generate, stop_tokens
from obliteratus.summon.chat_format import add_side_template, check_format, encode, read_traits
from obliteratus.summon.load import open_subject

THINKING = TEMPLATE.replace("'assistant:'", "'assistant:' if enable_thinking else 'assistant:<think></think>'")
GRANITE = TEMPLATE.replace("'assistant:'", "'assistant:<think>' if thinking else 'assistant:'")
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + TEMPLATE
)
DROPS_SYSTEM = TEMPLATE.replace("messages", "messages | rejectattr('role', 'equalto', 'system')")
CLOCK = (
    "  {% if strftime_now is defined %}{% set form = '%d %b %Y %H:%M:%S' %}{% macro it() %}{{ strftime_now(form) }}"
    '{% endmacro %}{{ it() }}, {{ strftime_now("%d") }}{% endif %}\n' + TEMPLATE
)


def subject_with(templates: Any, **chat: Any) -> Subject:
    subject = tiny_subject("llama")
    subject.tokenizer.chat_template = templates
    return replace(subject, chat=ChatFormat(**chat))


def text(subject: Subject, prompt: Prompt) -> str:
    (row,) = render_prompts(subject, [prompt])
    return str(subject.tokenizer.decode(row))


# ------------------------------------------------------------------------------------------ thinking, by name
@pytest.mark.parametrize("template", [THINKING, GRANITE])
def test_the_switch_is_found_by_rendering(template: str) -> None:
    on, off = (text(subject_with(template, thinking=mode), Prompt("hi")) for mode in (True, False))
    assert on != off
    assert {on.endswith("<think>"), off.endswith("<think></think>")} in ({True, False}, {False, True})


@pytest.mark.parametrize(
    "template", [TEMPLATE, TEMPLATE + "{# enable_thinking #}", "{% set thinking = 1 %}" + TEMPLATE]
)
def test_thinking_without_a_mode_is_refused(template: str) -> None:
    with pytest.raises(UserError, match="m: --thinking: the chat template has no thinking mode; leave the option out"):
        check_format(subject_with(template).tokenizer, ChatFormat(thinking=True), "m")
    check_format(subject_with(template).tokenizer, ChatFormat(), "m")


def test_thinking_without_a_template_is_refused() -> None:
    with pytest.raises(UserError, match="--thinking: the tokenizer has no chat template"):
        check_format(subject_with(None).tokenizer, ChatFormat(thinking=True), "m")


NAMED = {"default": THINKING, "tool_use": "TOOLS" + TEMPLATE}


def test_named_templates() -> None:
    assert text(subject_with(NAMED), Prompt("hi")) == text(subject_with(THINKING), Prompt("hi"))
    assert text(subject_with(NAMED, thinking=True), Prompt("hi")).endswith("assistant:")
    assert text(subject_with(NAMED, template="tool_use"), Prompt("hi")).startswith("TOOLS")


@pytest.mark.parametrize(
    ("templates", "name", "problem"),
    [
        ({"chat": TEMPLATE, "rag": TEMPLATE}, "", "several chat templates, chat, rag; choose one with --template NAME"),
        (NAMED, "tool-use", "--template 'tool-use'.*tool_use"),
        (TEMPLATE, "chat", "--template chat: the tokenizer has no named templates"),
        ("{{ messages | nothing }}", "", "the chat template cannot render the turns user"),
        ("{% if %}", "", "the chat template cannot render the turns user"),
    ],
)
def test_templates_that_cannot_be_used(templates: Any, name: str, problem: str) -> None:
    with pytest.raises(UserError, match=problem) as caught:
        check_format(subject_with(templates).tokenizer, ChatFormat(template=name), "m")
    assert "\n" not in str(caught.value)


def test_a_folder_with_a_list_of_templates(tmp_path: Path) -> None:
    """As older configurations keep them; nothing is loaded before one is chosen."""
    _save(tmp_path, [{"name": "chat", "template": TEMPLATE}, {"name": "rag", "template": "R" + TEMPLATE}])
    with pytest.raises(UserError, match="several chat templates, chat, rag"):
        open_subject(tmp_path)
    assert text(open_subject(tmp_path, chat=ChatFormat(template="rag")), Prompt("hi")).startswith("R")


def _save(folder: Path, templates: Any) -> None:
    subject = tiny_subject("llama")
    subject.model.save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **({"chat_template": templates} if templates else {})}))


# --------------------------------------------------------------------------------------------- side files
def test_a_template_beside_the_tokenizer(tmp_path: Path) -> None:
    _save(tmp_path, None)
    notes = Notes()
    with report_to(notes):
        raw = open_subject(tmp_path)
    assert any("has no chat template: prompts are given as raw text" in note for note in notes.texts)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    assert text(raw, Prompt("hi")) == "hi"
    assert text(open_subject(tmp_path), Prompt("hi")) == text(tiny_subject("llama"), Prompt("hi"))


def test_a_damaged_side_file(tmp_path: Path) -> None:
    (tmp_path / "chat_template.json").write_text("{")
    with pytest.raises(UserError, match="this is no chat template; download it again"):
        add_side_template(subject_with(None).tokenizer, tmp_path)


# ------------------------------------------------------------------------------------------- system turns
@pytest.mark.parametrize("template", [NO_SYSTEM, DROPS_SYSTEM])
def test_a_system_turn_that_the_template_does_not_take(template: str) -> None:
    subject, notes = subject_with(template), Notes()
    history = (Turn("user", "one"), Turn("assistant", "two"))
    with report_to(notes):
        found = text(subject, Prompt("three", system="Be brief.", history=history))
    assert found == "<bos>user: Be brief.\n\none\nassistant: two<eos>\nuser: three\nassistant:"
    assert notes.texts == ["prompts: the chat template takes no system turn: it is put before the first user turn"]


def test_a_system_turn_stays_one_where_the_template_takes_it() -> None:
    notes = Notes()
    with report_to(notes):
        found = text(subject_with(TEMPLATE), Prompt("hi", system="Be brief."))
    assert found == "<bos>system: Be brief.\nuser: hi\nassistant:"
    assert not notes.texts


def test_turns_that_cannot_be_rendered() -> None:
    subject = subject_with("{% if messages | length > 1 %}{{ raise_exception('one turn') }}{% endif %}" + TEMPLATE)
    with pytest.raises(UserError, match="cannot render the turns user, assistant, user: one turn"):
        render_prompts(subject, [Prompt("c", history=(Turn("user", "a"), Turn("assistant", "b")))])


# ---------------------------------------------------------------------------------------------- the clock
def test_the_clock_stands_still() -> None:
    """Prompts are the same tokens at any time of a run; another time would be other tokens."""
    noon = datetime(2026, 1, 2, 12, 30, 5)
    found = text(subject_with(CLOCK, now=noon), Prompt("hi"))
    assert found.startswith("02 Jan 2026 12:30:05, 02<bos>user")
    assert text(subject_with(CLOCK), Prompt("hi")) == text(subject_with(CLOCK), Prompt("hi")) != found


# --------------------------------------------------------------------------------------------- end of turn
IM = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
ASKS = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"


def test_an_answer_ends_at_the_templates_end_of_turn() -> None:
    """The refuser writes its word and goes on; configuration and tokenizer name another end token."""
    subject = refuser(word="<|im_end|>")
    end = subject.tokenizer.convert_tokens_to_ids("<|im_end|>")
    (row,) = render_prompts(subject, [Prompt("# stars")])
    (before,) = generate(subject, [row], 6)
    assert before[0] == end
    assert end not in stop_tokens(subject)
    subject.tokenizer.chat_template = TEMPLATE.replace("m.content", "m.content + '<|im_end|>'")
    assert find_answer_end(subject) == (end,)
    assert generate(subject, [row], 6) == [[]]


def test_an_end_of_turn_that_is_no_token() -> None:
    """Its bytes are as many tokens; the answer ends before them."""
    subject = subject_with(IM + ASKS)
    mark = find_answer_end(subject)
    assert subject.tokenizer.decode(mark) == "<|im_end|>"
    assert len(mark) == len("<|im_end|>")
    assert not stop_tokens(subject) & set(mark)


@pytest.mark.parametrize("template", [TEMPLATE.replace("{{ eos_token }}", ""), "{{ messages[0].content }}"])
def test_a_template_without_a_mark_has_no_end(template: str) -> None:
    tokenizer = subject_with(template).tokenizer
    assert read_traits(tokenizer, template).end == ()
    assert read_traits(tokenizer, TEMPLATE).end == (tokenizer.eos_token_id,)


def test_no_texts_have_no_tokens() -> None:
    assert encode(tiny_tokenizer(), []) == []
    assert encode(tiny_tokenizer(), ["", "a"])[0] == []
