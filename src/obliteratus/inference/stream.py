"""One answer, token by token, and a cache that the later turns of its conversation continue."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from obliteratus.core.errors import UserError
from obliteratus.core.shapes import Float
from obliteratus.core.types import Subject
from obliteratus.inference.answers import AnswerDecoder
from obliteratus.inference.logits import next_logits, select_position
from obliteratus.inference.shared_prefix import common_prefix_length, is_recurrent


@dataclass(frozen=True)
class AnswerLimits:
    """How long an answer may get, and how its tokens are chosen. Raises UserError for values out of range."""

    tokens: int = 512
    """Most tokens of an answer, at least 1."""
    temperature: float = 0.0
    """0 takes the likeliest token (greedy); 1 draws from the model's own distribution."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that together have this probability (0–1]; arXiv:1904.09751."""
    seed: int = 0
    """Of the draws; the same seed gives the same answer. Greedy answers ignore it."""

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise UserError(f"tokens {self.tokens}: an answer needs at least 1")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature {self.temperature}: give 0 for greedy answers, or a positive number")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p}: give a number above 0 and at most 1")


class ConversationCache:
    """Keys and values of the tokens that ran last. What the next tokens have in common with them is not run again.

    They hold for the model as it was edited then, so each plan and strength needs a cache of its own. A recurrent
    model's states cannot go back, so of these only the next token of the same answer is run on what is there.
    """

    def __init__(self, subject: Subject) -> None:
        self.subject, self.recurrent = subject, is_recurrent(subject)
        self.ids: list[int] = []
        """Tokens whose keys and values are in ``states``."""
        self.states: Any = None

    def next_logits(self, ids: list[int]) -> Float[Tensor, " vocabulary"]:
        """Return the logits of the token that follows ``ids``."""
        with torch.inference_mode():
            start = self._rewind(ids)
            self.ids = []  # an interrupt in the middle of the pass leaves states that nobody may use
            new = torch.tensor([ids[start:]], device=self.subject.device)
            last = torch.tensor([new.shape[1] - 1], device=new.device)
            with select_position(self.subject, last):
                logits = next_logits(self.subject, new, start, self.states)[0]
        self.ids = list(ids)
        return logits

    def _rewind(self, ids: list[int]) -> int:
        """Drop the states of all tokens that ``ids`` does not begin with. Return how many remain, fewer than ids."""
        common = common_prefix_length([self.ids, ids], leave=0) if self.ids else 0
        common = min(common, len(ids) - 1)
        if self.recurrent and not common == len(self.ids) == len(ids) - 1:
            common = 0
        if not common:
            self.states = DynamicCache(config=self.subject.model.config) if self.recurrent else DynamicCache()
        elif common < len(self.ids):
            self.states.crop(common - len(self.ids))
        return common


def draw_token(logits: Float[Tensor, " vocabulary"], limits: AnswerLimits, generator: torch.Generator) -> int:
    """Return the next token. The generator is one of the CPU, so that a seed gives the same draws on every device.

    Raises UserError if the logits are not finite, as those of a model that an edit has broken may be.
    """
    if not math.isfinite(float(logits.max())):
        raise UserError("the model computes NaN or infinity here; choose a strength nearer to 0")
    if limits.temperature == 0:
        return int(logits.argmax())
    ranked, order = (logits.float().cpu() / limits.temperature).softmax(-1).sort(descending=True)
    among = ranked.cumsum(0) - ranked < limits.top_p  # the likeliest token always is
    return int(order[torch.multinomial(ranked * among, 1, generator=generator)])


def cut_mark(tokens: Iterable[int], mark: tuple[int, ...]) -> Iterator[int]:
    """Yield tokens up to a mark of several tokens. Those that may be its beginning are held back till that is known."""
    held: list[int] = []
    for token in tokens:
        held.append(token)
        begun = count_begun(held, mark)
        yield from held[: len(held) - begun]
        held = held[len(held) - begun :]
        if mark and begun == len(mark):
            return
    yield from held


def count_begun(tokens: Sequence[int], mark: tuple[int, ...]) -> int:
    """Return how many of the last tokens are the beginning of the mark, or all of it."""
    return next(n for n in range(min(len(mark), len(tokens)), -1, -1) if tuple(tokens[len(tokens) - n :]) == mark[:n])


# What a further token may change: half a character, spaces (which some tokenizers clean up), and a mark of reasoning
# that is not whole yet. The longest declared marks have about 24 characters.
UNSETTLED = re.compile(r"(?:\ufffd|\s+|[<\[][^\s>\]]{0,24})\Z")


class TextPieces:
    """The text of an answer whose tokens come one by one. Pieces are whole characters, and add up to
    ``decoder.decode``."""

    def __init__(self, decoder: AnswerDecoder) -> None:
        self.decoder = decoder
        self.row: list[int] = []
        self.sent = ""

    def push(self, token: int) -> str:
        """Return what a further token settles of the text, often nothing."""
        self.row.append(token)
        text = UNSETTLED.sub("", self.decoder.decode(self.row))
        if len(text) <= len(self.sent) or not text.startswith(self.sent):
            return ""
        piece, self.sent = text[len(self.sent) :], text
        return piece

    def finish(self) -> str:
        """Return what is left once the last token came."""
        return self.decoder.decode(self.row).removeprefix(self.sent)


def stream_text(decoder: AnswerDecoder, tokens: Iterable[int]) -> Iterator[str]:
    """Yield an answer's text piece by piece. The pieces are whole characters, and add up to ``decoder.decode``."""
    pieces = TextPieces(decoder)
    yield from filter(None, map(pieces.push, tokens))
    if rest := pieces.finish():
        yield rest
