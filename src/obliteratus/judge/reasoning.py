"""Reasoning that precedes an answer is not the answer: it is cut away before anything is judged."""

from __future__ import annotations

import re

# Opening and closing mark of reasoning in released models. What follows the last closing mark is the answer.
MARKS = (
    (r"<(?:seed:)?(?:think|thinking|reasoning|thought|thoughts|reflection)>", r"</(?:seed:)?\w+>"),  # Qwen 3, R1, Seed
    (r"\[THINK\]", r"\[/THINK\]"),  # Magistral
    (r"<\|channel\|>(?:analysis|commentary)", r"<\|channel\|>final(?:<\|message\|>)?"),  # harmony: gpt-oss
    (r"<\|(?:begin_of_thought|START_THINKING)\|>", r"<\|(?:end_of_thought|END_THINKING)\|>"),  # Sky-T1, Command A
)
CLOSED = re.compile("|".join(rf"{opening}.*?{closing}" for opening, closing in MARKS), re.DOTALL)
OPEN = re.compile("|".join(rf"{opening}.*" for opening, _ in MARKS), re.DOTALL)
OPENING = "<think>"
"""The mark that others are brought to where a template declares its own."""
# A special token that is part of a mark, and so must not be dropped when tokens become text.
MARK = re.compile(
    r"</?(?:seed:)?(?:think|thinking|reasoning|thought|thoughts|reflection)>|\[/?THINK\]|<\|(?:channel|message)\|>|"
    r"<\|(?:begin_of_thought|end_of_thought|START_THINKING|END_THINKING)\|>"
)
# Many templates end with the opening mark, so that the model's own text holds the closing one alone.
CLOSING_ALONE = re.compile(r"^.*</(?:seed:)?(?:think|thinking|reasoning|thought|thoughts)>|^.*\[/THINK\]", re.DOTALL)
# An answer in its own channel, without reasoning before it.
FINAL_CHANNEL = re.compile(r"^\s*<\|channel\|>final(?:<\|message\|>)?")
# The channel names alone are left where special tokens are dropped on decoding.
BARE_CHANNEL = re.compile(r"^analysis.*?assistantfinal", re.DOTALL)


def cut_reasoning(text: str) -> str:
    """Return the text without its reasoning; a block that is never closed runs to the end."""
    return OPEN.sub("", _cut_closed(text)).strip()


def is_reasoning(text: str) -> bool:
    """Return whether a text ends inside reasoning, so that no answer has begun."""
    return OPEN.search(_cut_closed(text)) is not None


def _cut_closed(text: str) -> str:
    """Return the text without blocks of reasoning that are closed."""
    for pattern in (CLOSED, CLOSING_ALONE, BARE_CHANNEL, FINAL_CHANNEL):
        text = pattern.sub("", text)
    return text
