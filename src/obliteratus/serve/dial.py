"""A model with a plan whose strength is chosen anew for each answer."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from obliteratus.core.chat import Turn
from obliteratus.core.errors import UserError
from obliteratus.core.types import Plan, Prompt, Subject
from obliteratus.excise.live.compile import NormReadings
from obliteratus.excise.live.hooks import CompiledPlan, attached, compile_plan
from obliteratus.excise.plan import check_fits
from obliteratus.inference.answers import AnswerDecoder
from obliteratus.inference.chat_template import context_length, find_answer_end, tokenize_prompts
from obliteratus.inference.generate import stop_tokens
from obliteratus.inference.stream import AnswerLimits, ConversationCache, cut_mark, draw_token, stream_text
from obliteratus.judge.reasoning import cut_reasoning

WEAKEST, STRONGEST = -1.0, 2.0  # −1 doubles what 1 removes, 2 reflects it; beyond, the stream was noise on every model
KEPT_SETTINGS = 2  # the two that are compared side by side; each holds the keys and values of its conversation
ANSWER_ROOM = 4  # an answer may always have a quarter of the context


class Answer(Iterator[str]):
    """An answer that is being written. Iterating gives its pieces as they come, and `close` stops it at once."""

    def __init__(self, left_out: int = 0) -> None:
        self.text = ""
        """What has been written so far."""
        self.ended: Literal["", "end", "limit", "context"] = ""
        """``end`` if the model ended it, ``limit`` if it reached its number of tokens, ``context`` if it filled the
        model's context; empty until then, and if it was stopped."""
        self.left_out = left_out
        """How many of the oldest turns the model did not see, since its context is too short for them."""
        self.pieces: Iterator[str] = iter(())

    def __next__(self) -> str:
        piece = next(self.pieces)
        self.text += piece
        return piece

    def close(self) -> None:
        """End the answer. Its text stays."""
        self.pieces = iter(())


@dataclass
class Setting:
    """The plan at one strength, and what the model remembers of the conversation under it."""

    hooks: CompiledPlan
    cache: ConversationCache


@dataclass
class Dial:
    """A model with a plan whose strength is chosen anew for each answer. Nothing is saved, and no weight is copied.

    Strength 0 is the unedited model exactly, 1 the plan as it was made; −1 to 2 are allowed. Masks, and outputs set to
    zero, have no strength: they hold in full at any but 0. Between two pieces of an answer the model is unedited, so
    answers may be taken in turns, and anything else may run the model. Raises UserError for a plan that does not fit.
    """

    subject: Subject
    plan: Plan = field(default_factory=Plan)

    def __post_init__(self) -> None:
        if self.plan.edits:
            check_fits(self.subject, self.plan)
        self.decoder = AnswerDecoder.create(self.subject)
        self.settings: OrderedDict[float, Setting] = OrderedDict()
        self.readings: NormReadings = {}

    def stream(self, turns: Sequence[Turn], strength: float = 1.0, limits: AnswerLimits = AnswerLimits()) -> Answer:  # noqa: B008 — it is immutable
        """Return the answer to the last turn, which is written while it is iterated over.

        turns: `core.chat.Turn` (role, content): at most one system turn, which comes first, then user and assistant in
        turn, the last of them the user's. Reasoning in earlier answers is left out, as templates expect. Raises
        UserError for a strength outside −1 … 2, for a question that exceeds the model's context, and for turns that
        its template cannot render.
        """
        check_strength(strength)
        ids, left_out = self._fit(list(turns), limits)
        answer = Answer(left_out)
        setting = self.prepare(strength)
        answer.pieces = stream_text(self.decoder, self._write(ids, setting, limits, answer))
        return answer

    def _fit(self, turns: list[Turn], limits: AnswerLimits) -> tuple[list[int], int]:
        """Return the token ids of the turns, and how many of the oldest had to be left out to make room."""
        context = context_length(self.subject)
        room = context - min(limits.tokens, max(1, context // ANSWER_ROOM))
        system = [turn for turn in turns[:1] if turn.role == "system"]
        said = turns[len(system) :]
        for left_out in range(0, len(said), 2):
            ids = tokenize_prompts(self.subject, [to_prompt([*system, *said[left_out:]])])[0]
            if len(ids) <= room:
                return ids, left_out
        raise UserError(
            f"this turn is too long: with the system turn it has {len(ids)} tokens, and {room} of the model's "
            f"{context} are free for them; shorten it"
        )

    def prepare(self, strength: float) -> Setting:
        """Return the plan at this strength, compiled now unless it was one of the last two. `stream` does it too."""
        strength = strength if self.plan.edits else 0.0
        setting = self.settings.pop(strength, None)
        if setting is None:
            plan = self.plan.scaled(strength) if strength else Plan()
            setting = Setting(compile_plan(self.subject, plan, self.readings), ConversationCache(self.subject))
        self.settings[strength] = setting
        while len(self.settings) > KEPT_SETTINGS:
            self.settings.popitem(last=False)
        return setting

    def _write(self, ids: list[int], setting: Setting, limits: AnswerLimits, answer: Answer) -> Iterator[int]:
        """Yield the tokens of an answer, without what ends it."""
        end = find_answer_end(self.subject)
        mark = end if len(end) > 1 else ()
        yield from cut_mark(self._sample(ids, setting, limits, answer), mark)
        answer.ended = answer.ended or "end"

    def _sample(self, ids: list[int], setting: Setting, limits: AnswerLimits, answer: Answer) -> Iterator[int]:
        stops, generator = stop_tokens(self.subject), torch.Generator().manual_seed(limits.seed)
        row = list(ids)
        free = context_length(self.subject) - len(ids)
        for _ in range(min(limits.tokens, free)):
            with attached(setting.hooks):
                logits = setting.cache.next_logits(row)
            token = draw_token(logits, limits, generator)
            if token in stops:
                return
            yield token
            row.append(token)
        answer.ended = "limit" if limits.tokens <= free else "context"


def check_strength(strength: float) -> float:
    """Return the strength. Raises UserError unless it is in −1 … 2."""
    if not WEAKEST <= strength <= STRONGEST:  # NaN is not either
        raise UserError(
            f"strength {strength:g}: give a number from {WEAKEST:g} to {STRONGEST:g}; 0 is the unedited model and 1 "
            "the plan as it was made"
        )
    return strength


def to_prompt(turns: Sequence[Turn]) -> Prompt:
    """Return the turns as a prompt. Raises ValueError unless they end with one of the user's."""
    system = turns[0].content if turns and turns[0].role == "system" else ""
    said = list(turns)[1 if turns and turns[0].role == "system" else 0 :]
    if not said or said[-1].role != "user" or any(turn.role == "system" for turn in said):
        raise ValueError("a conversation is at most one system turn, then turns of which the last is the user's")
    return Prompt(said[-1].content, system=system, history=tuple(map(_without_reasoning, said[:-1])))


def _without_reasoning(turn: Turn) -> Turn:
    answer = cut_reasoning(turn.content)
    return Turn(turn.role, answer) if turn.role == "assistant" and answer != turn.content.strip() else turn
