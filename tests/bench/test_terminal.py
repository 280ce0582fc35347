"""A program with a menu is driven through a pseudo-terminal."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from bench.terminal import DOWN, ENTER, run_in_terminal

from obliteratus.core.errors import UserError

PROGRAM = r"""
import os, sys, termios, tty
tty.setcbreak(0)
print("\x1b[1mloaded\x1b[0m", flush=True)
sys.stdout.write("\x1b[6n"); sys.stdout.flush()   # as menus do: where is the cursor?
answer = os.read(0, 16)
assert answer == b"\x1b[1;1R", answer
print("Which trial do you want to use? \xbb first, second, third", flush=True)
at, typed = 0, b""
while True:
    key = os.read(0, 16)
    if key == b"\x1b[B": at += 1
    elif key in (b"\r", b"\n"): break
    else: typed += key
print(f"chosen {at} {typed.decode()}", flush=True)
os.read(0, 16)
"""


def test_a_menu_is_driven(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    with run_in_terminal([sys.executable, "program.py"], tmp_path, {"PYTHONUTF8": "1"}, tmp_path / "log") as screen:
        shown = screen.wait_for("Which trial", 20) + screen.wait_until_quiet(0.3)
        assert re.search("^loaded$", shown, re.MULTILINE)  # colors are taken off
        assert "» first" in shown
        screen.press(DOWN, DOWN, "/a/folder", ENTER)
        assert "chosen 2 /a/folder" in screen.wait_for("chosen", 20) + screen.wait_until_quiet(0.3)
    assert b"chosen 2" in (tmp_path / "log").read_bytes()


def test_a_program_that_ends_or_hangs_is_reported(tmp_path: Path) -> None:
    log = tmp_path / "log"
    for command, seconds in ((["sh", "-c", "echo no such model"], 20.0), (["sleep", "60"], 0.5)):
        with run_in_terminal(command, tmp_path, {}, log) as screen, pytest.raises(UserError, match="no 'menu'"):
            screen.wait_for("menu", seconds)
    with pytest.raises(UserError, match="no-such-program"), run_in_terminal(["no-such-program"], tmp_path, {}, log):
        pass
