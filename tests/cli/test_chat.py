"""`obliteratus chat` in a pipe: a line is a turn, answers alone are on stdout, and a bad line is one line of stderr."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.served import save_model_and_plans
from typer.testing import CliRunner, Result

from obliteratus.cli.app import app
from obliteratus.cli.chat import COMMANDS
from obliteratus.core.chat import Turn
from obliteratus.inference.stream import AnswerLimits
from obliteratus.serve.dial import Dial
from obliteratus.summon.load import open_subject

TOKENS = 8


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``model``, and two plans for it."""
    return save_model_and_plans(tmp_path_factory.mktemp("chat"))


def talk(folders: Path, *lines: str, options: str = "--plan one --plan two", tokens: int = TOKENS) -> Result:
    options = " ".join(str(folders / o) if o in ("one", "two") else o for o in options.split())
    arguments = ["chat", str(folders / "model"), "--quiet", "--tokens", str(tokens), *options.split()]
    return CliRunner().invoke(app, arguments, input="\n".join(lines) + "\n")


def expected(folders: Path, plan: str, strength: float, *turns: Turn) -> str:
    from obliteratus.excise.plan import load_plan

    dial = Dial(open_subject(folders / "model"), load_plan(folders / plan))
    return "".join(dial.stream(turns, strength, AnswerLimits(TOKENS)))


ASKED = Turn("user", "What is a comet?")


def test_answers_alone_are_on_stdout(folders: Path) -> None:
    first = expected(folders, "one", 1.0, ASKED)
    second = expected(folders, "one", 0.5, ASKED, Turn("assistant", first), ASKED)
    result = talk(folders, ASKED.content, "/strength 0.5", "", ASKED.content)
    assert result.exit_code == 0
    assert result.stdout == f"{first}\n\n{second}\n"
    assert "the next answer: one at strength 0.5" in result.stderr


def test_base_shows_both_answers(folders: Path) -> None:
    result = talk(folders, ASKED.content, "/plan two", "/retry", "/base")
    unedited, edited = (expected(folders, "two", s, ASKED) for s in (0.0, 1.0))
    assert result.stdout.endswith(f"unedited:\n{unedited}\n\ntwo at strength 1:\n{edited}\n")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/strength abc", "strength abc: give a number from -1 to 2"),
        ("/strength 7", "strength 7: give a number from -1 to 2"),
        ("/strength nan", "give a number from -1 to 2"),
        ("/strengt 1", "command '/strengt' does not exist; did you mean '/strength'?"),
        ("/", "command '/' does not exist"),
        ("/plan three", "plan 'three' does not exist; known: one, two; or give a plan's folder"),
        ("/plan /", "there is no plan.safetensors"),
        ("/save", "/save needs a file"),
        ("/save /proc/x.md", "/proc/x.md cannot be written (No such file or directory); name another file"),
        ("/save /proc/version", "/proc/version exists already; name another file"),
        ("x" * 400, "this turn is too long"),
    ],
)
def test_a_bad_line_is_one_line_and_the_conversation_goes_on(folders: Path, line: str, said: str) -> None:
    result = talk(folders, ASKED.content, line, "/retry")
    first = expected(folders, "one", 1.0, ASKED)
    assert result.exit_code == 0
    assert result.stdout == f"{first}\n\n{first}\n"
    (error,) = [text for text in result.stderr.splitlines() if text.startswith("error: ")]
    assert said in error


@pytest.mark.parametrize("line", ["/retry", "/base", "/save x.md"])
def test_what_needs_a_question_says_so(folders: Path, line: str) -> None:
    result = talk(folders, line)
    assert result.stderr == "error: nothing was asked yet; type a question first\n"
    assert result.exit_code == 0


def test_old_turns_are_left_out_with_a_word(folders: Path) -> None:
    result = talk(folders, *["x" * 60] * 4)
    assert "the first 2 turns no longer fit into the model's context" in result.stderr
    assert "error" not in result.stderr


def test_an_answer_that_was_cut_off_says_so(folders: Path) -> None:
    assert "cut off after 8 tokens; --tokens N allows more" in talk(folders, ASKED.content).stderr
    told = talk(folders, ASKED.content, tokens=1000).stderr
    assert "the model's context is full" in told or "cut off" not in told


def test_a_conversation_is_saved_and_saved_again_but_nothing_is_overwritten(folders: Path, tmp_path: Path) -> None:
    file = tmp_path / "said.md"
    result = talk(folders, ASKED.content, f"/save {file}", ASKED.content, f"/save {file}")
    assert result.stderr.count("saved to") == 2
    assert file.read_text(encoding="utf-8").count(ASKED.content) == 2
    assert str(tmp_path) not in file.read_text(encoding="utf-8")
    assert "exists already" in talk(folders, ASKED.content, f"/save {file}").stderr


def test_help_names_every_command_in_lines_of_a_terminal(folders: Path) -> None:
    lines = talk(folders, "/help").stderr.splitlines()
    assert [line.split()[0] for line in lines] == [f"/{name}" for name in COMMANDS]
    assert max(map(len, lines)) < 80


def test_bytes_that_are_no_text_are_read_as_their_codes(folders: Path) -> None:
    arguments = ["chat", str(folders / "model"), "--quiet", "--tokens", "4"]
    found = [CliRunner().invoke(app, arguments, input=text) for text in (b"a \xff\n", b"a \\xff\n")]
    assert [result.exit_code for result in found] == [0, 0]
    assert found[0].stdout == found[1].stdout != ""


def test_a_reader_that_leaves_ends_the_chat_without_a_word(folders: Path) -> None:
    command = [sys.executable, "-m", "obliteratus", "chat", str(folders / "model"), "--quiet", "--tokens", "4"]
    with subprocess.Popen(command, stdin=-1, stdout=-1, stderr=-1, text=True) as program:
        assert program.stdin
        assert program.stdout
        program.stdout.close()
        _, errors = program.communicate("a\n" * 5, timeout=50)
    assert errors == ""
    assert program.returncode == 0


def test_quit_leaves_the_rest_unread(folders: Path) -> None:
    assert talk(folders, "/quit", ASKED.content).stdout == ""


def test_the_system_turn_counts(folders: Path) -> None:
    with_system = expected(folders, "one", 1.0, Turn("system", "Be brief."), ASKED)
    assert talk(folders, "/system Be brief.", ASKED.content).stdout == f"{with_system}\n"
    assert talk(folders, "/system Be brief.", "/system", ASKED.content).stdout != f"{with_system}\n"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--strength 3", "strength 3: give a number from -1 to 2"),
        ("--strength 0.5", "--strength 0.5: there is no plan"),
        ("--temperature -1", "temperature -1.0"),
        ("--top-p 2", "top_p 2.0"),
        ("--plan /", "no plan.safetensors"),
    ],
)
def test_bad_options_are_one_line(folders: Path, options: str, said: str) -> None:
    result = talk(folders, options=options)
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
