"""What a chat template does: its thinking switch, whether it takes system turns, and how it ends an answer.

Templates are programs, so this is found by rendering them, and not by searching their text.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, TemplateError

from obliteratus.core.chat import ChatFormat, Turn
from obliteratus.core.errors import UserError, unknown_name

Turns = Sequence[Mapping[str, str]]

QUESTION, ANSWER = "What is the name of the river?", "It is called Zeltbach."
SYSTEM = "Answer in one sentence."
# What public templates call the switch: Qwen, SmolLM3, GLM and Hunyuan the first, Granite and DeepSeek the second.
SWITCHES = ("enable_thinking", "thinking")
# Marks that templates write as plain text where the tokenizer has no token for them.
MARK = re.compile(r"<[^<>\s]+>|\[/?[A-Za-z_]+\]")
SIDE_FILE = "chat_template.json"  # where processors of some years kept the template, which tokenizers do not read


class Traits(NamedTuple):
    """What a template does."""

    switch: str
    """Name of the variable that turns thinking on, or '' if the template has no thinking mode."""
    takes_system: bool
    """Whether system turns are rendered. If not, they go into the user turn."""
    end: tuple[int, ...]
    """The tokens that end an answer: one special token, or a mark of plain text. Empty if there is none."""


def find_template(tokenizer: Any, chat: ChatFormat) -> str:
    """Return the text of the chat template, or '' if the tokenizer has none.

    Raises UserError if there are several and none of them is the default or the named one.
    """
    templates = tokenizer.chat_template
    if not isinstance(templates, dict):
        if chat.template:
            raise UserError(f"--template {chat.template}: the tokenizer has no named templates; leave the option out")
        return templates or ""
    name = chat.template or "default"
    if name not in templates:
        if chat.template:
            raise UserError(unknown_name("--template", name, sorted(templates)))
        names = ", ".join(sorted(templates))
        raise UserError(f"the tokenizer has several chat templates, {names}; choose one with --template NAME")
    return str(templates[name])


def render_turns(
    tokenizer: Any, template: str, conversations: Sequence[Turns], now: datetime, **options: Any
) -> list[str]:
    """Return each conversation as text. Raises UserError if the template cannot render one.

    now: what the template prints if it prints the date or the time. options: of the template.
    """
    options = {"add_generation_prompt": True, **_read_clock(template, now), **options}
    template = STOPPED_CLOCK + template if CLOCK in template else template
    try:
        return list(
            tokenizer.apply_chat_template(list(conversations), chat_template=template, tokenize=False, **options)
        )
    except (TemplateError, TypeError) as error:
        roles = ", ".join(turn["role"] for turn in conversations[0])
        raise UserError(f"the chat template cannot render the turns {roles}: {str(error)[:160]}") from error


# Templates are given the clock as a function. Functions of ours are not let through, so a macro looks the time up.
CLOCK = "strftime_now"
STOPPED_CLOCK = f"{{% macro {CLOCK}(format) %}}{{{{ stopped_clock[format] }}}}{{% endmacro %}}\n"


def _read_clock(template: str, now: datetime) -> dict[str, dict[str, str]]:
    """Return the time in every format that the template may ask for: any of its strings with a % in it."""
    if CLOCK not in template:
        return {}
    strings = [value for _, kind, value in Environment().lex(template) if kind == "string" and "%" in value]
    return {"stopped_clock": {form: now.strftime(form) for form in map(ast.literal_eval, strings)}}


@lru_cache(maxsize=16)  # asked for at each batch of prompts; a few renderings take some milliseconds
def read_traits(tokenizer: Any, template: str) -> Traits:
    """Return what a template of this tokenizer does. Raises UserError if it cannot render a user turn."""
    noon = datetime(2000, 1, 1, 12)

    def render(*turns: Turn, **options: Any) -> str:
        return render_turns(tokenizer, template, [[turn._asdict() for turn in turns]], noon, **options)[0]

    user = Turn("user", QUESTION)
    render(user)
    switch = next((n for n in SWITCHES if render(user, **{n: True}) != render(user, **{n: False})), "")
    return Traits(switch, _takes_system(render), _find_end(tokenizer, render))


Render = Callable[..., str]


def _takes_system(render: Render) -> bool:
    try:
        return SYSTEM in render(Turn("system", SYSTEM), Turn("user", QUESTION))
    except UserError:
        return False


def _find_end(tokenizer: Any, render: Render) -> tuple[int, ...]:
    """Return the tokens between an answer and the next turn, up to the end of the first mark among them."""
    asked = Turn("user", QUESTION), Turn("assistant", ANSWER), Turn("user", SYSTEM)
    try:
        text = render(*asked, add_generation_prompt=False)
    except UserError:
        return ()  # the template renders no earlier turns
    between = text.rpartition(ANSWER)[2].partition(SYSTEM)[0].lstrip() if ANSWER in text else ""
    (ids,) = encode(tokenizer, [between])
    if ids and ids[0] in tokenizer.added_tokens_decoder:
        return (ids[0],)
    mark = MARK.match(between)
    return tuple(encode(tokenizer, [mark[0]])[0]) if mark else ()


def encode(tokenizer: Any, texts: Sequence[str], add_special_tokens: bool = False) -> list[list[int]]:
    """Return the token ids of each text. Raises UserError if the tokenizer cannot represent one."""
    if not texts:
        return []  # tokenizers fail on an empty batch
    try:
        rows = tokenizer(list(texts), add_special_tokens=add_special_tokens)["input_ids"]
    except Exception as error:
        if type(error) is not Exception:  # which tokenizers raises itself, where a character has no token
            raise
        raise UserError(f"the tokenizer cannot encode a text ({str(error)[:120]}); give the model's own one") from error
    return [list(map(int, row)) for row in rows]


def check_format(tokenizer: Any, chat: ChatFormat, name: str) -> None:
    """Raise UserError if the model ``name`` cannot be asked in this format, before its weights are loaded."""
    try:
        template = find_template(tokenizer, chat)
        switch = read_traits(tokenizer, template).switch if template else ""
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    if chat.thinking and not switch:
        what = "chat template has no thinking mode" if template else "tokenizer has no chat template"
        raise UserError(f"{name}: --thinking: the {what}; leave the option out")


def add_side_template(tokenizer: Any, folder: Path) -> None:
    """Give a tokenizer that has no template the one of `SIDE_FILE`. Raises UserError for a damaged file."""
    file = folder / SIDE_FILE
    if tokenizer.chat_template or not file.is_file():
        return
    try:
        tokenizer.chat_template = json.loads(file.read_text(encoding="utf-8"))["chat_template"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: this is no chat template; download it again") from error
