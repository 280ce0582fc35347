"""A conversation with a model under one of several plans: what was said, at which strength, and what may follow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from obliteratus.core.chat import Turn
from obliteratus.core.errors import UserError, unknown_name
from obliteratus.core.types import Mask, Plan, Subject, ZeroOutput
from obliteratus.inference.stream import AnswerLimits
from obliteratus.serve.dial import Answer, Dial, check_strength
from obliteratus.serve.open import load_plan_for


@dataclass
class Exchange:
    """A question, and the answer to it while and after it is written."""

    question: str
    answer: Answer
    plan: str
    """Name of the plan that was active, or '' if there was none."""
    strength: float
    limits: AnswerLimits
    unedited: Answer | None = None
    """What the unedited model answers, if that was asked for."""

    @property
    def setting(self) -> str:
        """What the answer was written under, in words."""
        return describe_setting(self.plan, self.strength)


def describe_setting(plan: str, strength: float) -> str:
    """Return a plan and its strength in words, such as ``lean at strength 0.6``."""
    return f"{plan} at strength {strength:g}" if plan and strength else "unedited"


@dataclass
class Conversation:
    """What was said so far, and the settings of the next answer.

    A method that returns an `Answer` writes nothing by itself: iterate over it. An answer that was stopped before its
    first piece, or failed, leaves the conversation as it was.
    """

    subject: Subject
    plans: dict[str, Plan]
    """The plans by name. The first is active."""
    strength: float = 1.0
    limits: AnswerLimits = field(default_factory=AnswerLimits)
    system: str = ""

    def __post_init__(self) -> None:
        check_strength(self.strength)
        self.exchanges: list[Exchange] = []
        self.replaced: Exchange | None = None
        """What `retry` put another answer in place of."""
        self.answers = 0
        self.use_plan(next(iter(self.plans), ""))

    @property
    def setting(self) -> str:
        """What the next answer is written under, in words."""
        return describe_setting(self.active, self.strength)

    def use_plan(self, name: str) -> None:
        """Make a plan the active one: one of `plans`, or that of a folder, which is loaded. '' is none.

        Raises UserError if there is none of that name, or if it does not fit the model.
        """
        if name and name not in self.plans:
            if not Path(name).expanduser().is_dir():
                raise UserError(f"{unknown_name('plan', name, self.plans or ['none'])}; or give a plan's folder")
            name, plan = load_plan_for(self.subject, name)
            self.plans[name] = plan
        self.active = name
        self.dial = Dial(self.subject, self.plans.get(name, Plan()))
        self.dial.prepare(self.strength)

    def set_strength(self, strength: float) -> None:
        """Set the strength of the answers to come. Raises UserError outside −1 … 2, and if there is no plan."""
        if not self.active:
            raise UserError("there is no plan whose strength could be set; /plan FOLDER loads one")
        self.strength = check_strength(strength)
        self.dial.prepare(strength)  # so that the next answer begins at once

    @property
    def unscaled(self) -> int:
        """How many changes of the active plan hold in full at any strength but 0."""
        return sum(isinstance(change, Mask | ZeroOutput) for change in self.dial.plan.edits)

    # ------------------------------------------------------------------------------------------- answers
    def ask(self, question: str) -> Answer:
        """Return the answer to a further question. Raises UserError as `Dial.stream`."""
        self._drop_unanswered()
        self.replaced = None
        return self._answer(question)

    def retry(self) -> Answer:
        """Return another answer to the last question, in place of the one before. Raises UserError if there is none."""
        last = self.last()
        self.exchanges.pop()
        try:
            answer = self._answer(last.question)
        except UserError:
            self.exchanges.append(last)
            raise
        self.replaced = last
        return answer

    def answer_unedited(self) -> Answer:
        """Return what the unedited model answers to the last question, with the same draws. The conversation goes on
        from the other answer. Raises UserError if nothing was asked."""
        last = self.last()
        answer = self.dial.stream(self._turns(self.exchanges[:-1], last.question), 0.0, last.limits)
        last.unedited = answer
        return answer

    def last(self) -> Exchange:
        """Return the last question with its answer. Raises UserError if nothing was asked."""
        self._drop_unanswered()
        if not self.exchanges:
            raise UserError("nothing was asked yet; type a question first")
        return self.exchanges[-1]

    def _answer(self, question: str) -> Answer:
        limits = replace(self.limits, seed=self.limits.seed + self.answers)  # each answer is drawn anew
        answer = self.dial.stream(self._turns(self.exchanges, question), self.strength, limits)
        self.exchanges.append(Exchange(question, answer, self.active, self.strength, limits))
        self.answers += 1
        return answer

    def _turns(self, exchanges: list[Exchange], question: str) -> list[Turn]:
        system = [Turn("system", self.system)] if self.system else []
        said = [turn for e in exchanges for turn in (Turn("user", e.question), Turn("assistant", e.answer.text))]
        return [*system, *said, Turn("user", question)]

    def _drop_unanswered(self) -> None:
        """Take back a last question that got no answer, and put back the answer that it was to replace."""
        if self.exchanges and not self.exchanges[-1].answer.text and not self.exchanges[-1].answer.ended:
            self.exchanges.pop()
            self.exchanges += [self.replaced] if self.replaced else []
            self.replaced = None


def to_markdown(conversation: Conversation) -> str:
    """Return the conversation as Markdown: each answer with the plan and strength that it was written under."""
    lines = [f"# Conversation with {name_model(conversation.subject)}", ""]
    lines += [f"Plans: {', '.join(conversation.plans)}.", ""] if conversation.plans else []
    lines += [f"System: {conversation.system}", ""] if conversation.system else []
    for exchange in conversation.exchanges:
        lines += ["## You", "", exchange.question, "", f"## Answer, {exchange.setting}", "", exchange.answer.text, ""]
        if exchange.unedited is not None and exchange.unedited.text:
            lines += ["### The unedited model answers", "", exchange.unedited.text, ""]
    return "\n".join(lines)


def name_model(subject: Subject) -> str:
    """Return the model's name for readers: of a local folder or file, only its own name."""
    path = Path(subject.source.id).expanduser()
    return path.resolve().name if path.exists() else subject.source.id


def list_settings(plans: Mapping[str, Plan], active: str) -> list[str]:
    """Return a line for each plan, the active one marked."""
    return [f"{'*' if name == active else ' '} {name} ({len(plan.edits)} changes)" for name, plan in plans.items()]
