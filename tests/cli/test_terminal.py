"""What every command prints: nothing is cut or too wide, a stage is ticked once, and times add up."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from io import StringIO

import pytest
from rich.cells import cell_len
from rich.console import Console
from tests.support.printing import save_refuser
from typer.testing import CliRunner

from obliteratus.cli.app import app
from obliteratus.cli.progress import Lines
from obliteratus.cli.stage_names import STAGES, describe_stage, format_seconds, format_times
from obliteratus.cli.tables import PATH
from obliteratus.core.clock import Clock
from obliteratus.core.progress import note, progress, report_to

CONTROL_CHARACTERS = re.compile(r"[\x00-\x09\x0b-\x1f\x7f]")
TICK = re.compile(r"^✓ (\S+(?: \S+){0,2}?)  ")
PARTS = re.compile(r"[A-Za-z ]+?(?: \d+)? (?:(\d+) min )?(\d+(?:\.\d+)?) s")
COMMANDS = {
    "methods": "methods",
    "behaviors": "behaviors",
    "inspect": "inspect {model}",
    "run": "run {model} {prompts} --set weigh.0.low=0 --out {out}",  # the refuser refuses in an early block
    "informed": "run {model} {prompts} --method informed",
    "tuned": "run {model} {prompts} --method tuned --set tune.steps=6",
    "search": "search {model} {prompts} --trials 6 --set search.fluency_limit=1e9 --out {out} --save plan",
    "verify": "verify {model} {prompts} --out {out}",
    "against": "verify {model} --against {model} {prompts}",
    "analyze": "analyze {model} {prompts} --out {out} --only geometry,lens",
    "study": "study quick {model} {prompts} --set data.samples=8 --out {out}",
}
"""Commands by a name; those below use what these have written."""
AFTER = {
    "apply": "apply {search} {model} --out {out}",
    "judge": "judge {run}",
    "report": "report {study}",
}


@dataclass(frozen=True)
class Printed:
    """What a command printed."""

    out: str
    err: str
    seconds: float

    @property
    def lines(self) -> list[str]:
        return [*self.out.splitlines(), *self.err.splitlines()]


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Printed]:
    """What each command prints in a pipe, 80 columns wide, about a tiny model that refuses."""
    folder = tmp_path_factory.mktemp("t")
    save_refuser(folder)
    places = {name: folder / name for name in COMMANDS} | {"model": folder / "refuser"}
    prompts = f"--target {folder}/target.jsonl --control {folder}/control.jsonl"
    return {
        name: call(line.format(**places | {"out": folder / name}, prompts=prompts).split())
        for name, line in (COMMANDS | AFTER).items()
    }


def call(arguments: list[str]) -> Printed:
    start = time.perf_counter()
    result = CliRunner(env={"COLUMNS": "80", "TERM": "dumb"}).invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return Printed(result.stdout, result.stderr, time.perf_counter() - start)


@pytest.mark.parametrize("name", [*COMMANDS, *AFTER])
def test_it_fits_80_columns_and_nothing_is_cut(name: str, printed: dict[str, Printed]) -> None:
    for line in printed[name].lines:
        assert cell_len(line) <= 80 or PATH.fullmatch(line.split()[-1]), line
        assert "…" not in line, line


@pytest.mark.parametrize("name", [*COMMANDS, *AFTER])
def test_a_log_has_no_control_characters(name: str, printed: dict[str, Printed]) -> None:
    assert not CONTROL_CHARACTERS.search(printed[name].out)
    assert not CONTROL_CHARACTERS.search(printed[name].err)


@pytest.mark.parametrize("name", [*COMMANDS, *AFTER])
def test_each_stage_has_one_tick_and_words(name: str, printed: dict[str, Printed]) -> None:
    ticks = [match[1] for line in printed[name].lines if (match := TICK.match(line))]
    assert all(describe_stage(tick) for tick in ticks), ticks
    assert {stage: n for stage, n in Counter(ticks).items() if n > 1} == {}


@pytest.mark.parametrize("name", ["run", "informed", "tuned", "search", "analyze", "study"])
def test_times_add_up_to_the_whole(name: str, printed: dict[str, Printed]) -> None:
    lines = printed[name].out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("Time"))
    text = " ".join([lines[start], *(line for line in lines[start + 1 : start + 5] if line.startswith("        "))])
    whole, _, parts = " ".join(text.split()).partition(":")
    listed = sum(60 * int(minutes or 0) + float(seconds) for minutes, seconds in PARTS.findall(parts))
    assert float(re.findall(r"([\d.]+) s", whole)[0]) == pytest.approx(listed, abs=0.05 * (parts.count(",") + 3))
    assert listed == pytest.approx(printed[name].seconds, rel=0.05, abs=0.5)  # rounding, and the printing itself


def test_a_stage_that_is_not_listed_would_be_missed() -> None:
    assert format_times({"PROBE 1": 81.0}) == "81.0 s: PROBE 1 81.0 s"
    assert "other 233.0 s" in format_times({"PROBE 1": 81.0, "other": 233.0})


@pytest.mark.parametrize("name", [*COMMANDS, *AFTER])
def test_nothing_is_printed_twice(name: str, printed: dict[str, Printed]) -> None:
    sentences = [s for s in re.split(r"(?<=[.:;])\s", " ".join(printed[name].lines)) if len(s.split()) > 8]
    assert [s for s, n in Counter(sentences).items() if n > 1] == []


@pytest.mark.parametrize(
    "name", ["run", "informed", "tuned", "search", "verify", "against", "apply", "analyze", "study"]
)
def test_the_end_says_what_to_do_next(name: str, printed: dict[str, Printed]) -> None:
    assert re.search(r"^Next    \S", printed[name].out, re.MULTILINE)


def test_run_and_verify_print_one_kind_of_table(printed: dict[str, Printed]) -> None:
    def names(text: str) -> set[str]:
        rows = text.split("─\n", 1)[1].split("\nperplexity", 1)[0].splitlines()
        found = {re.split(r"  +", row)[0] for row in rows if row}
        return {
            name for name in found if "off topic" not in name
        }  # a group of refusals and loops alone has no such score

    assert names(printed["verify"].out) <= names(printed["run"].out)
    assert "refuses target prompts" in names(printed["verify"].out)
    assert "refusal.target" not in printed["run"].out + printed["verify"].out


# ------------------------------------------------------------------------------------------------ progress
@pytest.fixture
def lines() -> Iterator[StringIO]:
    file = StringIO()
    with report_to(Lines(Console(file=file, width=80))):
        yield file


def test_a_stage_inside_another_counts_once(lines: StringIO) -> None:
    clock = Clock()
    with clock.time("SEARCH"):
        time.sleep(0.02)
        with clock.time("PROBE 1"):
            time.sleep(0.06)
    assert clock.seconds["PROBE 1"] >= 0.06
    assert 0.02 <= clock.seconds["SEARCH"] < 0.06
    assert sum(clock.account().values()) == pytest.approx(0.08, abs=0.03)
    assert [line.split()[1] for line in lines.getvalue().splitlines()] == ["PROBE", "SEARCH"]


def test_a_stage_that_fails_has_no_tick(lines: StringIO) -> None:
    with pytest.raises(ZeroDivisionError), Clock().time("PROBE 1"):
        raise ZeroDivisionError
    assert lines.getvalue() == ""


def test_a_note_is_no_tick_and_is_said_once(lines: StringIO) -> None:
    for _ in range(2):
        note("prompts", "a long remark " * 12)
    text = lines.getvalue()
    assert "✓" not in text
    assert text.count("prompts:") == 1
    assert text.count("remark") == 12
    assert max(map(len, text.splitlines())) <= 80


def test_a_long_wait_is_said_in_a_log(lines: StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(0, 1000, 20))
    monkeypatch.setattr("obliteratus.cli.progress.perf_counter", lambda: float(next(now)))
    with progress("VERIFY answers", 8) as advance:
        for _ in range(8):
            advance(1)
    said = lines.getvalue().splitlines()
    assert said[0] == "  VERIFY answers: 2 of 8, 0.1/s, 120.0 s left"
    assert len(said) == 3  # every 30 s, which is every other of these steps of 20 s


def test_every_stage_that_is_named_fits(lines: StringIO) -> None:
    for name in STAGES:
        with Clock().time(name):
            pass
    rows = lines.getvalue().splitlines()
    assert all(STAGES[name] in row for name, row in zip(STAGES, rows, strict=True))
    assert {cell_len(row) for row in rows} == {80}


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (314.2, "314.2 s"), (725.0, "12 min 5 s"), (7500.0, "2 h 5 min")]
)
def test_times_for_people(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


# ------------------------------------------------------------------------------------------------ a terminal
CODE = """
import time
from obliteratus.cli.options import show_progress
from obliteratus.core.progress import note, progress
with show_progress(quiet=False, verbose=True) as clock:
    with clock.time("SEARCH"), progress("REBIRTH writes tensors", 4000) as advance:
        for _ in range(4):
            time.sleep(0.15)
            advance(1000)
    note("prompts", "a remark")
"""


def in_terminal(**env: str) -> str:
    """What the code prints in a terminal of 80 columns."""
    leader, follower = pty.openpty()
    here = {**os.environ, "COLUMNS": "80", "LINES": "24", **env}
    process = subprocess.Popen([sys.executable, "-c", CODE], stdout=follower, stderr=follower, env=here)
    os.close(follower)
    text = b""
    while select.select([leader], [], [], 60)[0]:
        try:
            data = os.read(leader, 65536)
        except OSError:  # the other end is closed
            break
        text += data
    assert process.wait() == 0
    os.close(leader)
    return text.decode()


def test_a_terminal_shows_bars_with_rate_and_time_left() -> None:
    text = in_terminal(TERM="xterm")
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert "\x1b[" in text
    assert re.search(r"REBIRTH writes tensors .*\d000/4000 [\d.]+/s \d:\d\d:\d\d \d:\d\d:\d\d", plain)
    assert max(cell_len(line) for line in re.split(r"[\r\n]+", plain)) <= 80
    assert plain.count("✓") == 1


@pytest.mark.parametrize("env", [{"TERM": "dumb"}, {"TERM": "dumb", "NO_COLOR": "1"}])
def test_a_dumb_terminal_gets_lines_alone(env: dict[str, str]) -> None:
    text = in_terminal(**env).replace("\r\n", "\n")
    assert not CONTROL_CHARACTERS.search(text)
    assert text.splitlines()[0].startswith("✓ SEARCH")
    assert text.splitlines()[1] == "· prompts: a remark"


def test_no_color_is_respected() -> None:
    colors = re.compile(r"\x1b\[(?:\d+;)*(?:3\d|4\d|9\d)(?:;\d+)*m")
    assert colors.search(in_terminal(TERM="xterm", NO_COLOR=""))
    assert not colors.search(in_terminal(TERM="xterm", NO_COLOR="1"))
