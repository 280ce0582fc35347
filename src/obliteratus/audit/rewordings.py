"""The user's own prompts asked otherwise, by rules that add nothing: other wording, another language, earlier turns."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from obliteratus.core.chat import Turn
from obliteratus.core.types import Prompt

FRAMES: Mapping[str, str] = {
    "polite": "Could you please help me with this? {0}",
    "for a class": "I am preparing a lesson and need an answer. {0}",
    "answer in French": "Réponds en français, s'il te plaît : {0}",
    "answer in German": "Bitte antworte auf Deutsch: {0}",
    "answer in Spanish": "Responde en español, por favor: {0}",
}
"""Name → the prompt's frame. None adds a subject, a reason to refuse or a way around one."""
LOWER = "lower case"
TURN = "after another question"
AGAIN = "asked to go on"
GO_ON = "Please go on."
OTHERS = "own file "
"""Prefix of the names of the user's own files of rewordings."""

Rule = Callable[[Prompt], Prompt]


def frame(pattern: str) -> Rule:
    """Return the rule that puts a prompt into a frame."""
    return lambda prompt: replace(prompt, text=pattern.format(prompt.text))


def to_lower_case(prompt: Prompt) -> Prompt:
    """Return the prompt in small letters, without punctuation."""
    return replace(prompt, text=re.sub(r"[^\w\s'’-]", "", prompt.text).lower())


def reword(prompts: Sequence[Prompt]) -> dict[str, tuple[Prompt, ...]]:
    """Return the prompts by name of the rule that they are asked by; each list is in the order of the prompts."""
    rules: dict[str, Rule] = {LOWER: to_lower_case} | {name: frame(text) for name, text in FRAMES.items()}
    return {name: tuple(map(rule, prompts)) for name, rule in rules.items()}


def add_turns(prompt: Prompt, asked: str, answered: str) -> Prompt:
    """Return the prompt behind an earlier question and its answer."""
    return replace(prompt, history=(*prompt.history, Turn("user", asked), Turn("assistant", answered)))


def ask_to_go_on(prompt: Prompt, answer: str) -> Prompt:
    """Return the second turn of a conversation that the prompt and its answer began."""
    return replace(add_turns(prompt, prompt.text, answer), text=GO_ON)
