"""One conversation held twice: with the unedited model and with the edited one, side by side."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from obliteratus.core.chat import Turn
from obliteratus.inference.stream import AnswerLimits
from obliteratus.serve.ui.workbench import Asked, Workbench

Side = Literal["base", "edited"]
SIDES: tuple[Side, ...] = ("base", "edited")


@dataclass(frozen=True)
class PairedChat:
    """The turns of both sides. Each side sees its own answers alone."""

    base: tuple[Turn, ...] = ()
    edited: tuple[Turn, ...] = ()
    open: tuple[Side, ...] = ()
    """Sides whose last answer is not complete."""

    def turns(self, side: Side) -> tuple[Turn, ...]:
        """Return the turns of a side."""
        return self.base if side == "base" else self.edited

    def ask(self, text: str) -> PairedChat:
        """Return the conversation with a new question to both sides, and without one that has no answer."""
        settled = self.settle()
        question = Turn("user", text)
        return PairedChat((*settled.base, question), (*settled.edited, question), SIDES)

    def reopen(self) -> PairedChat:
        """Return the conversation with the edited side's last answer open, to be given again at another strength."""
        asked = replace(self, edited=_without_answer(self.edited))
        asked = replace(asked, base=_without_answer(self.base)) if "base" in self.open else asked
        sides: tuple[Side, ...] = SIDES if "base" in self.open else ("edited",)
        return replace(asked, open=sides if asked.edited else ())

    def answer(self, side: Side, text: str, complete: bool) -> PairedChat:
        """Return the conversation with the answer of a side as it is so far."""
        turns = (*_without_answer(self.turns(side)), *([Turn("assistant", text)] if text else []))
        left = tuple(s for s in self.open if not (complete and s == side))
        return PairedChat(turns, self.edited, left) if side == "base" else PairedChat(self.base, turns, left)

    def settle(self) -> PairedChat:
        """Return the conversation as it stands: answers so far stay, and a question without any is left out."""
        return PairedChat(_without_question(self.base), _without_question(self.edited))


def _without_answer(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    return turns[:-1] if turns and turns[-1].role == "assistant" else turns


def _without_question(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    return turns[:-1] if turns and turns[-1].role == "user" else turns


class Voice(NamedTuple):
    """Who answers, and how."""

    name: str
    """A finished run, or a model."""
    member: int = 0
    """Of the run's front; 0 for the plan that the run chose."""
    strength: float = 1.0
    system: str = ""
    limits: AnswerLimits = AnswerLimits()


def converse(bench: Workbench, session: str, chat: PairedChat, voice: Voice) -> Iterator[tuple[PairedChat, str, str]]:
    """Yield the conversation, what is being done, and what is wrong, while its open sides are answered side by side.

    It ends early, without a word, if the session stops the answers or asks for others.
    """
    sides = chat.open
    system = [Turn("system", voice.system)] if voice.system.strip() else []
    strengths = {"base": 0.0, "edited": voice.strength}
    asked = [Asked([*system, *chat.turns(side)], strengths[side]) for side in sides]
    number = bench.start_answers(session, voice.name, voice.member, asked, voice.limits)
    for state in bench.queue.follow(number):
        if state.status == "stopped":
            return
        for side, written in zip(sides, state.written, strict=False):  # nothing is written at first
            chat = chat.answer(side, written.text, written.complete)
        if state.status == "failed":
            yield chat.settle(), "", state.message
            return
        yield chat, _describe(bench, state.status, state.message), ""


def _describe(bench: Workbench, status: str, message: str) -> str:
    """Return what is being done for the answers, or what was left out of them at the end."""
    if status != "waiting":
        return "Answering …" if status == "running" else message[:1].upper() + message[1:]
    others = [state.title for state in bench.queue.states() if state.status == "running"]
    return f"Waiting for: {others[0]}" if others else "Waiting"
