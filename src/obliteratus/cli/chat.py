"""Define the command `chat`: a conversation with a model while its edit is turned up and down."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from obliteratus.cli.options import (
    Device,
    Dtype,
    Quantize,
    Quiet,
    Served,
    Template,
    Thinking,
    Trust,
    Verbose,
    collect_opening,
    show_progress,
)
from obliteratus.core.errors import UserError, unknown_name

if TYPE_CHECKING:
    from obliteratus.cli.chat_screen import Pipe
    from obliteratus.serve.conversation import Conversation
    from obliteratus.serve.dial import Answer

TERMINATED = 128 + signal.SIGTERM  # as shells expect


def chat(
    model: Served,
    plan: Annotated[list[str] | None, typer.Option(help="Folder with a plan. Several may be given; see /plan.")] = None,
    strength: Annotated[float, typer.Option(help="Of the plan: 0 is the unedited model, 1 the plan; -1 to 2.")] = 1.0,
    tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token, 1 draws as the model does.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw among the likeliest tokens of this probability together.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    dtype: Dtype = "auto",
    quantize: Quantize = "",
    device: Device = "auto",
    trust_remote_code: Trust = False,
    thinking: Thinking = False,
    template: Template = "",
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Talk to a model, and set the strength of its edit for each answer."""
    from obliteratus.inference.stream import AnswerLimits
    from obliteratus.serve.conversation import Conversation
    from obliteratus.serve.dial import check_strength
    from obliteratus.serve.open import open_for_chat

    limits = AnswerLimits(tokens, temperature, top_p, seed)
    check_strength(strength)
    opening = collect_opening(dtype, device, trust_remote_code, quantize, thinking, template)
    with show_progress(quiet, verbose):
        subject, plans = open_for_chat(model, plan or [], opening)
    if strength != 1 and not plans:
        raise UserError(f"--strength {strength:g}: there is no plan whose strength could be set; give --plan FOLDER")
    hold(Conversation(subject, plans, strength, limits), quiet)


def hold(conversation: Conversation, quiet: bool = False) -> None:
    """Read lines and answer them until the input ends or ``/quit``."""
    from obliteratus.cli.chat_screen import open_screen

    with _ended_by_terminate(), open_screen() as screen:
        talk = Talk(conversation, screen)
        if screen.interactive and not quiet:
            talk.greet()
        while not talk.done:
            try:
                talk.take(screen.read(talk.prompt))
            except EOFError:
                talk.done = True
            except KeyboardInterrupt:
                if not screen.interactive:
                    raise
                screen.say("\nCtrl-D or /quit leaves the chat.")


@contextmanager
def _ended_by_terminate() -> Iterator[None]:
    """Let SIGTERM end the chat, and not only an answer as Ctrl-C does. Where it is ignored it stays ignored."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(TERMINATED)

    before = signal.getsignal(signal.SIGTERM)
    if before is not signal.SIG_IGN:
        signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@dataclass
class Talk:
    """What each line that is read does to a conversation and shows on a screen."""

    conversation: Conversation
    screen: Pipe
    done: bool = False
    saved: set[Path] = field(default_factory=set)
    """Files that this chat wrote, and so may write again."""

    @property
    def prompt(self) -> str:
        """What stands before the line to be typed: the plan and its strength."""
        talk = self.conversation
        return f"{talk.active} {talk.strength:g}> " if talk.active else "> "

    def greet(self) -> None:
        """Say what is talked to, and how to find out more."""
        from obliteratus.serve.conversation import name_model

        subject = self.conversation.subject
        say = self.screen.say
        say(f"{name_model(subject)}, {subject.source.dtype} on {subject.device.type}: {self.conversation.setting}")
        self._tell_of_unscaled()
        say("/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves.")

    def take(self, line: str) -> None:
        """Answer a question or obey a command. What the user can mend is one line, and the conversation goes on."""
        try:
            if line.startswith("/"):
                name, _, argument = line[1:].strip().partition(" ")
                self._find_command(name)(self, argument.strip())
            elif line.strip():
                self._show(self.conversation.ask(line.strip()))
        except UserError as error:
            self.screen.complain(f"error: {error}")

    def _find_command(self, name: str) -> Callable[[Talk, str], None]:
        if name not in COMMANDS:
            hint = unknown_name("command", f"/{name}", [f"/{known}" for known in COMMANDS])
            raise UserError(f"{hint} (a question that begins with / needs a space before it)")
        return COMMANDS[name][2]

    # ------------------------------------------------------------------------------------------- commands
    def set_strength(self, argument: str) -> None:
        """Set the strength, or tell it."""
        if argument:
            self.conversation.set_strength(_parse_strength(argument))
        self.screen.say(f"the next answer: {self.conversation.setting}")

    def choose_plan(self, argument: str) -> None:
        """Make a plan the active one, or list them."""
        from obliteratus.serve.conversation import list_settings

        if argument:
            self.conversation.use_plan(argument)
            self.screen.say(f"the next answer: {self.conversation.setting}")
            self._tell_of_unscaled()
            return
        for line in list_settings(self.conversation.plans, self.conversation.active) or ["no plan is loaded"]:
            self.screen.say(line)

    def set_system(self, argument: str) -> None:
        """Set the system turn, or take it away."""
        self.conversation.system = argument
        self.screen.say("the system turn is set" if argument else "there is no system turn")
        if argument and not _takes_system(self.conversation):
            self.screen.say("this model's template has no system turn: it goes before your first question")

    def retry(self, argument: str) -> None:
        """Answer the last question again, in place of the answer before."""
        before = self.conversation.last()
        answer = self.conversation.retry()
        self._show(answer)
        if answer.ended and answer.text == before.answer.text and not self.conversation.limits.temperature:
            self.screen.say("the same answer again: without --temperature only the settings change it")

    def compare(self, argument: str) -> None:
        """Show the unedited model's answer to the last question beside the one given."""
        last = self.conversation.last()
        if last.setting == "unedited":
            raise UserError("the last answer is the unedited model's; choose a /plan or a /strength, then /retry")
        answer = self.conversation.answer_unedited()
        with self._stoppable(answer) as pieces:
            self.screen.show_beside(("unedited", pieces), (last.setting, [last.answer.text]))

    def save(self, argument: str) -> None:
        """Write the conversation as Markdown."""
        from obliteratus.serve.conversation import to_markdown

        if not argument:
            raise UserError("/save needs a file: /save FILE.md")
        self.conversation.last()
        file = Path(argument).expanduser()
        if file.resolve() not in self.saved and file.exists():
            raise UserError(f"{file} exists already; name another file")
        try:
            file.write_text(to_markdown(self.conversation), encoding="utf-8")
        except OSError as error:
            raise UserError(f"{file} cannot be written ({error.strerror}); name another file") from error
        self.saved.add(file.resolve())
        self.screen.say(f"saved to {file}")

    def help(self, argument: str) -> None:
        """List the commands."""
        for name, (usage, text, _) in COMMANDS.items():
            self.screen.say(f"{f'/{name} {usage}':<16} {text}")

    def leave(self, argument: str) -> None:
        """End the chat."""
        self.done = True

    # ------------------------------------------------------------------------------------------- answers
    def _show(self, answer: Answer) -> None:
        with self._stoppable(answer) as pieces:
            self.screen.show(pieces)

    @contextmanager
    def _stoppable(self, answer: Answer) -> Iterator[Iterator[str]]:
        """Let Ctrl-C stop the answer and nothing else, and tell how it ended. In a pipe it stops the chat."""

        def take_pieces() -> Iterator[str]:
            try:
                yield from answer
            except KeyboardInterrupt:
                if not self.screen.interactive:
                    raise

        try:
            yield take_pieces()
        except KeyboardInterrupt:  # between two pieces
            if not self.screen.interactive:
                raise
        answer.close()
        self._tell_end(answer)

    def _tell_end(self, answer: Answer) -> None:
        if answer.left_out:
            self.screen.say(
                f"the first {answer.left_out} turns no longer fit into the model's context and were left out"
            )
        if answer.ended == "limit":
            self.screen.say(f"cut off after {self.conversation.limits.tokens} tokens; --tokens N allows more")
        elif answer.ended == "context":
            self.screen.say("cut off, since the model's context is full")
        elif not answer.ended:
            self.screen.say("stopped" if answer.text else "stopped before it began: the question is taken back")

    def _tell_of_unscaled(self) -> None:
        if n := self.conversation.unscaled:
            self.screen.say(f"{n} changes of this plan (masks) have no strength: they hold in full at any but 0")


def _parse_strength(text: str) -> float:
    """Return the number. Raises UserError if it is none."""
    try:
        return float(text.replace("−", "-").replace(",", "."))
    except ValueError as error:
        raise UserError(f"strength {text[:20]}: give a number from -1 to 2, such as 0.6") from error


def _takes_system(conversation: Conversation) -> bool:
    """Return whether the model's chat template has system turns."""
    from obliteratus.summon.chat_format import find_template, read_traits

    subject = conversation.subject
    template = find_template(subject.tokenizer, subject.chat)
    return bool(template) and read_traits(subject.tokenizer, template).takes_system


COMMANDS: dict[str, tuple[str, str, Callable[[Talk, str], None]]] = {
    "strength": ("0.6", "how strongly to edit: 0 not at all, 1 the plan; -1 to 2", Talk.set_strength),
    "base": ("", "the last answer, side by side with the unedited model's", Talk.compare),
    "retry": ("", "answer the last question again, with what is set now", Talk.retry),
    "plan": ("NAME", "another plan, by name or folder; alone: list them", Talk.choose_plan),
    "system": ("TEXT", "what the model is told first; alone: nothing", Talk.set_system),
    "save": ("FILE.md", "write the conversation to a file", Talk.save),
    "help": ("", "this list", Talk.help),
    "quit": ("", "leave, as Ctrl-D does", Talk.leave),
}
"""Name → what follows it, what it does, and the method that does it."""
