"""Define turns of conversations, and how prompts are rendered as such."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Literal, NamedTuple

Speaker = Literal["user", "assistant", "system"]


class Turn(NamedTuple):
    """A turn of a conversation."""

    role: Speaker
    content: str


STARTED = datetime.now()


@dataclass(frozen=True)
class ChatFormat:
    """How prompts are rendered as conversations."""

    thinking: bool = False
    """Value of the thinking switch for chat templates that have one."""
    template: str = ""
    """Name of the template, if the tokenizer has several. Empty stands for ``default``."""
    now: datetime = STARTED
    """What templates print that print the date or the time: the time at which the process, or the run, began. Were it
    the clock, the same prompt would be other tokens a minute later."""


DEFAULT_CHAT = ChatFormat()
