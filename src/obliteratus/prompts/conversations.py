"""Turn a recorded conversation into a prompt: its last user turn, with the system turn and the turns before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from obliteratus.core.chat import Speaker, Turn
from obliteratus.core.errors import UserError

# OpenAI and most data sets write role and content, ShareGPT from and value.
ROLE_KEYS, CONTENT_KEYS = ("role", "from"), ("content", "value")
ROLES: dict[str, Speaker] = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}


def read_conversation(turns: Sequence[Any], where: str) -> tuple[str, tuple[Turn, ...], str]:
    """Return the system turn, the turns before the last user turn, and its text. What follows is the answer.

    Raises UserError for turns that are no text of a user, an assistant or a system.
    """
    read = [_read_turn(turn, where) for turn in turns]
    last = max((i for i, (role, _) in enumerate(read) if role == "user"), default=-1)
    if last < 0:
        raise UserError(f"{where}: the conversation has no user turn; leave the row out")
    system = read[0].content if read[0].role == "system" else ""
    history = tuple(read[1 if read[0].role == "system" else 0 : last])
    if any(turn.role == "system" for turn in history):
        raise UserError(f"{where}: a system turn stands inside the conversation; only the first turn may be one")
    for one, other in pairwise([*history, read[last]]):
        if one.role == other.role:
            raise UserError(f"{where}: two {one.role} turns follow each other; join them")
    return system, history, read[last].content


def _read_turn(turn: Any, where: str) -> Turn:
    if not isinstance(turn, Mapping):
        raise UserError(f"{where}: a turn is no object with a role and a content: {str(turn)[:60]}")
    role, content = (
        next((turn[key] for key in keys if turn.get(key) is not None), None) for keys in (ROLE_KEYS, CONTENT_KEYS)
    )
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise UserError(f"{where}: a turn has the role '{role}'; only {', '.join(ROLES)} are read")
    return Turn(ROLES[role.lower()], _read_content(content, role, where))


def _read_content(content: Any, role: str, where: str) -> str:
    """Return a content that is text, or a list of parts that are text."""
    if isinstance(content, str):
        return content.strip()
    if not isinstance(content, list):
        raise UserError(f"{where}: the {role} turn holds no text: {str(content)[:60]}")
    for part in content:
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else part
            raise UserError(
                f"{where}: the {role} turn holds a part that is no text ({str(kind)[:40]}); leave the row out"
            )
    return "\n".join(part["text"] for part in content).strip()
