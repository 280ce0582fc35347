"""The tab in which the unedited and the edited model answer side by side, at any strength of the edit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from obliteratus.core.errors import UserError
from obliteratus.inference.stream import AnswerLimits
from obliteratus.serve.dial import STRONGEST, WEAKEST
from obliteratus.serve.ui.events import AT_ONCE, STREAMED
from obliteratus.serve.ui.pages import show_message
from obliteratus.serve.ui.paired_chat import PairedChat, Voice, converse
from obliteratus.serve.ui.results_tab import build_member, offer_members
from obliteratus.serve.ui.workbench import Workbench

STEP = 0.1  # of the dial
TOKENS = 256  # of an answer: a minute of a small model on two cores
Shown = tuple[Any, ...]
"""PairedChat, both columns, and what is said below them."""


def build(bench: Workbench) -> dict[Any, Any]:
    """Add the tab's components and what they do; return its lists, and what each offers at the moment."""
    state = gr.State(PairedChat())
    with gr.Row(equal_height=True):
        voice = gr.Dropdown([], value=None, label="Talk to a run, or to a model as it is", elem_id="voice")
        member = build_member("chat-member")
    dial = gr.Slider(
        WEAKEST,
        STRONGEST,
        value=1.0,
        step=STEP,
        label="Strength of the edit",
        info="0: unedited. 1: as made. 2: reflected. Below 0: the opposite.",
        elem_id="dial",
    )
    with gr.Row(elem_id="columns"):
        base, edited = _column("Unedited", "base"), _column("Edited", "edited")
    said = gr.HTML(elem_id="chat-said", padding=False)
    with gr.Row(equal_height=True, elem_id="ask"):
        text = gr.Textbox(label="Your turn", placeholder="Ask both", lines=1, max_lines=8, scale=6, elem_id="text")
        send = gr.Button("Send", variant="primary", scale=1, min_width=90, elem_id="send")
    with gr.Row():
        stop = gr.Button("Stop the answer", size="sm", elem_id="chat-stop")
        clear = gr.Button("New conversation", size="sm", elem_id="chat-clear")
    with gr.Accordion("System turn and length", open=False, elem_id="chat-more"):
        system = gr.Textbox(label="System turn", lines=2, elem_id="system")
        tokens = gr.Number(value=TOKENS, precision=0, label="Most tokens of an answer", elem_id="tokens")
    shown, settings = [state, base, edited, said], [voice, member, dial, system, tokens]
    ask = _asker(bench)
    gr.on([send.click, text.submit], ask, [state, text, *settings], [text, *shown], **STREAMED)
    dial.input(_turner(bench), [state, *settings], shown, **STREAMED)
    stop.click(_stopper(bench), state, shown, **AT_ONCE)
    gr.on([clear.click, voice.input, member.input], _clearer(bench), None, shown, **AT_ONCE)
    voice.change(lambda name: offer_members(bench, name), voice, member, **AT_ONCE)
    return {voice: bench.list_voices}


def _column(label: str, side: str) -> Any:
    """Return one side. Answers are shown as they are written: what a model writes is no markup of this page."""
    with gr.Column(min_width=280):
        gr.HTML(f'<div class="side">{label}</div>', padding=False)  # Gradio's own label covers the first line
        return gr.Chatbot(
            label=label,
            show_label=False,
            elem_id=f"chat-{side}",
            height=420,
            render_markdown=False,
            layout="bubble",
            buttons=["copy"],
            feedback_options=None,
            placeholder=" ",
            allow_file_downloads=False,
        )


def _asker(bench: Workbench) -> Any:
    def ask(request: gr.Request, state: PairedChat, text: str | None, *settings: Any) -> Iterator[Shown]:
        if not text or not text.strip():
            yield text, *show(state)
            return
        asked = state.ask(text.strip())
        for shown in _follow(bench, request, asked, settings, fallback=state):
            yield text if shown[-1] else "", *show(*shown)

    return ask


def _turner(bench: Workbench) -> Any:
    def turn(request: gr.Request, state: PairedChat, *settings: Any) -> Iterator[Shown]:
        reopened = state.reopen()
        if reopened.open and bench.is_last_turn(str(request.session_hash)):
            for shown in _follow(bench, request, reopened, settings, fallback=state):
                yield show(*shown)

    return turn


def _stopper(bench: Workbench) -> Any:
    def stop(request: gr.Request, state: PairedChat) -> Shown:
        bench.stop_answer(str(request.session_hash))
        return show(state.settle(), "Stopped.")

    return stop


def _clearer(bench: Workbench) -> Any:
    def clear(request: gr.Request) -> Shown:
        bench.stop_answer(str(request.session_hash))
        return show(PairedChat())

    return clear


def _follow(
    bench: Workbench, request: gr.Request, asked: PairedChat, settings: tuple[Any, ...], fallback: PairedChat
) -> Iterator[tuple[PairedChat, str, str]]:
    """Yield the conversation, what is done and what is wrong. fallback: the conversation if nothing can be asked."""
    name, member, strength, system, tokens = settings  # a field that nobody touched is None
    try:
        if not name:
            raise UserError("choose a run or a model to talk to")
        voice = Voice(name, member or 0, float(strength), system or "", AnswerLimits(int(tokens or TOKENS)))
        yield from converse(bench, str(request.session_hash), asked, voice)
    except UserError as error:
        yield fallback.settle(), "", bench.hide_places(str(error))


def show(chat: PairedChat, doing: str = "", wrong: str = "") -> Shown:
    """Return what the components show of a conversation."""
    columns = [[turn._asdict() for turn in turns] for turns in (chat.base, chat.edited)]
    return chat, *columns, show_message(wrong) if wrong else show_message(doing, "about")
