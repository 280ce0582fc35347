"""`obliteratus chat` in a terminal: Ctrl-C stops an answer and nothing else, lines are remembered, Ctrl-D leaves."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pexpect
import pytest
from tests.support.plans import random_plan
from tests.support.tiny import tiny, tiny_tokenizer

from obliteratus.excise.plan import save_plan
from obliteratus.summon.load import open_subject

PROMPT = r"one [-.\d]+> (?:\x1b\[0m)?"
UP, CTRL_D = "\x1b[A", "\x04"
LONG = 100_000
"""Tokens that nobody waits for."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    model = tiny("llama", max_position_embeddings=2 * LONG)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    save_plan(random_plan(open_subject(folder / "model")), folder / "one")
    return folder


@contextmanager
def started(folders: Path, tokens: int = 8, **environment: str) -> Iterator[pexpect.spawn[str]]:
    """Start a chat in a terminal of 80 columns, and end it afterwards."""
    program = pexpect.spawn(
        sys.executable,
        ["-m", "obliteratus", "chat", "model", "--plan", "one", "--tokens", str(tokens)],
        cwd=str(folders),
        env=os.environ | {"XDG_STATE_HOME": str(folders / "state"), "TERM": "xterm"} | environment,
        dimensions=(40, 80),
        encoding="utf-8",
        codec_errors="replace",
        timeout=50,
    )
    try:
        yield program
    finally:
        program.close(force=True)


def say(program: pexpect.spawn[str], line: str) -> None:
    program.expect(PROMPT)
    program.send(f"{line}\r")


def leave(program: pexpect.spawn[str]) -> int | None:
    program.expect(PROMPT)
    program.send(CTRL_D)
    program.expect(pexpect.EOF)
    program.close()
    return program.exitstatus


def test_control_c_stops_the_answer_and_control_d_leaves(folders: Path) -> None:
    with started(folders, LONG) as program:
        say(program, "hello")
        program.expect(r"hello\r\n[^\r\n]+")  # some of the answer is there
        program.sendintr()
        program.expect("stopped")
        program.expect(PROMPT)
        program.send("half a line")
        program.sendintr()
        program.expect("Ctrl-D or /quit leaves the chat")
        say(program, "/strength 0.5")
        program.expect("one at strength 0.5")
        assert leave(program) == 0


def test_lines_come_back_in_the_same_chat_and_the_next(folders: Path) -> None:
    with started(folders, XDG_STATE_HOME=str(folders / "kept")) as program:
        say(program, "/strength 0.25")
        assert leave(program) == 0
    history = folders / "kept" / "obliteratus" / "chat_history"
    assert history.read_text() == "/strength 0.25\n"
    assert history.stat().st_mode & 0o077 == 0
    with started(folders, XDG_STATE_HOME=str(folders / "kept")) as program:
        say(program, UP)
        program.expect("the next answer: one at strength 0.25")
        assert leave(program) == 0


def test_a_state_folder_that_cannot_be_written_is_one_line(folders: Path) -> None:
    (folders / "file").write_text("")
    with started(folders, XDG_STATE_HOME=str(folders / "file")) as program:
        assert leave(program) == 0
        assert "the lines typed were not kept" in str(program.before)


@pytest.mark.parametrize(("environment", "styled"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)])
def test_text_is_plain_where_it_should_be(folders: Path, environment: dict[str, str], styled: bool) -> None:
    with started(folders, **environment) as program:
        say(program, "hello")
        program.expect(PROMPT)
        shown = str(program.before)
        program.send("/base\r")
        program.expect(PROMPT)
        shown += str(program.before)
    assert "unedited" in shown
    assert bool(re.search(r"\x1b\[\d*m", shown)) == styled


def test_terminate_ends_the_chat_in_the_middle_of_an_answer(folders: Path) -> None:
    with started(folders, LONG) as program:
        say(program, "hello")
        program.expect(r"hello\r\n[^\r\n]+")
        program.kill(signal.SIGTERM)
        program.expect(pexpect.EOF)
        program.close()
        assert program.exitstatus == 128 + signal.SIGTERM
    history = folders / "state" / "obliteratus" / "chat_history"
    assert "hello" in history.read_text()  # what was typed is kept all the same
