"""Answers in OpenAI's format: whole, or as the events of a stream."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from obliteratus.inference.answers import AnswerDecoder
from obliteratus.inference.stream import TextPieces
from obliteratus.serve.prepared_plans import Setting

Kind = Literal["chat", "text"]
NAMES: dict[Kind, tuple[str, str, str]] = {
    "chat": ("chatcmpl-", "chat.completion", "chat.completion.chunk"),
    "text": ("cmpl-", "text_completion", "text_completion"),
}
DONE = b"data: [DONE]\n\n"


class StoppedText:
    """The text of an answer up to the first complete one of several stop texts. What may be the beginning of one is
    held back."""

    def __init__(self, decoder: AnswerDecoder, stops: Sequence[str]) -> None:
        self.pieces, self.stops = TextPieces(decoder), tuple(stops)
        self.held = ""
        self.stopped = False

    def push(self, tokens: Sequence[int]) -> str:
        """Return what further tokens settle of the text."""
        return self._cut("".join(map(self.pieces.push, tokens)))

    def finish(self) -> str:
        """Return what is left once the last token came."""
        text = self._cut(self.pieces.finish())
        if self.stopped:
            return text
        rest, self.held = text + self.held, ""
        return rest

    def _cut(self, piece: str) -> str:
        if self.stopped:
            return ""
        text = self.held + piece
        found = [(at + len(stop), at) for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:  # the one that was complete first
            self.stopped, self.held = True, ""
            return text[: min(found)[1]]
        begun = max((n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        self.held = text[len(text) - begun :]
        return text[: len(text) - begun]


class WholeText:
    """The text of an answer that nobody reads before it is complete, so that it is decoded once."""

    stopped = False

    def __init__(self, decoder: AnswerDecoder) -> None:
        self.decoder = decoder
        self.row: list[int] = []

    def push(self, tokens: Sequence[int]) -> str:
        """Keep further tokens."""
        self.row += tokens
        return ""

    def finish(self) -> str:
        """Return the text."""
        return self.decoder.decode(self.row)


@dataclass(frozen=True)
class Completion:
    """An answer's identity, which its document or all of its events bear."""

    kind: Kind
    model: str
    setting: Setting
    prompt_tokens: int
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def to_document(self, text: str, tokens: int, finish: str) -> dict[str, Any]:
        """Return a whole answer. tokens: how many it has. finish: ``stop`` or ``length``."""
        message = {"role": "assistant", "content": text, "refusal": None}
        own: dict[str, Any] = {"message": message} if self.kind == "chat" else {"text": text}
        choice = {"index": 0, "finish_reason": finish, "logprobs": None, **own}
        return {**self._head(NAMES[self.kind][1]), "choices": [choice], "usage": self.count_usage(tokens)}

    def to_event(self, text: str, finish: str | None = None, first: bool = False) -> bytes:
        """Return the event of a piece of the answer."""
        role = {"role": "assistant"} if first else {}
        own = {"delta": {**role, "content": text} if text or first else {}} if self.kind == "chat" else {"text": text}
        choice = {"index": 0, "finish_reason": finish, "logprobs": None, **own}
        return to_event({**self._head(NAMES[self.kind][2]), "choices": [choice]})

    def to_usage_event(self, tokens: int) -> bytes:
        """Return the last event of a stream that was to have the numbers of tokens."""
        return to_event({**self._head(NAMES[self.kind][2]), "choices": [], "usage": self.count_usage(tokens)})

    def count_usage(self, tokens: int) -> dict[str, int]:
        """Return the numbers of tokens."""
        total = self.prompt_tokens + tokens
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": tokens, "total_tokens": total}

    def _head(self, name: str) -> dict[str, Any]:
        strength = {"strength": self.setting.strength}  # ours: what the answer was written under
        begin = NAMES[self.kind][0]
        return {"id": begin + self.id, "object": name, "created": self.created, "model": self.model, **strength}


def to_event(data: dict[str, Any]) -> bytes:
    """Return data as an event of a stream."""
    return b"data: " + json.dumps(data, ensure_ascii=False).encode() + b"\n\n"
