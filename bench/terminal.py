"""Drive a program with menus through a pseudo-terminal: wait for what it shows, type keys, and log everything."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pexpect

from obliteratus.core.errors import UserError

ROWS, COLUMNS = 120, 200  # room for a menu of a hundred lines, none of which wraps
CONTROL = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b[=>]|\r")
WHERE, HERE = "\x1b[6n", "\x1b[1;1R"  # a menu asks where the cursor is and waits for the answer
DOWN, ENTER = "\x1b[B", "\r"
KEY_PAUSE = 0.3  # seconds between keys: programs take keys that arrive together with an escape for one key


class Terminal:
    """A running program. Start it with `run_in_terminal`."""

    def __init__(self, program: pexpect.spawn[str], log: Path) -> None:
        self.program, self.log, self.shown = program, log, ""

    def wait_for(self, pattern: str, seconds: float) -> str:
        """Return the text shown since the last call, once it matches. Raises UserError if it does not in time."""
        deadline = time.monotonic() + seconds
        while not re.search(pattern, CONTROL.sub("", self.shown)):
            if time.monotonic() > deadline or not self._read(1.0):
                last = " / ".join(CONTROL.sub("", self.shown).strip().splitlines()[-3:])
                raise UserError(
                    f"the program showed no '{pattern}' in {seconds:.0f} s; it ended with: {last}; {self.log}"
                )
        return self._take()

    def wait_until_quiet(self, quiet: float = 1.0) -> str:
        """Return the text shown since the last call, once nothing has come for so many seconds."""
        before = None
        while before != self.shown:
            before = self.shown
            self._read(quiet)
        return self._take()

    def press(self, *keys: str) -> None:
        """Type one key or text after the other."""
        for key in keys:
            self.program.send(key)
            time.sleep(KEY_PAUSE)

    def _take(self) -> str:
        text, self.shown = CONTROL.sub("", self.shown), ""
        return text

    def _read(self, seconds: float) -> bool:
        """Wait for output for at most so many seconds, and return whether the program still runs."""
        try:
            piece = self.program.read_nonblocking(65536, seconds)
        except pexpect.TIMEOUT:
            return True
        except pexpect.EOF:
            return False
        if WHERE in piece:
            self.program.send(HERE)
        self.shown += piece
        return True


@contextmanager
def run_in_terminal(command: Sequence[str], folder: Path, extra: Mapping[str, str], log: Path) -> Iterator[Terminal]:
    """Run the command in the folder with extra environment variables, and end it afterwards if it still runs.

    Raises UserError if there is no such command.
    """
    environment = os.environ | dict(extra) | {"TERM": "xterm", "COLUMNS": str(COLUMNS), "LINES": str(ROWS)}
    with log.open("a", encoding="utf-8") as file:
        try:
            program = pexpect.spawn(
                command[0],
                list(command[1:]),
                cwd=str(folder),
                env=environment,
                dimensions=(ROWS, COLUMNS),
                encoding="utf-8",
                codec_errors="replace",
            )
        except pexpect.ExceptionPexpect as error:
            raise UserError(f"{command[0]}: cannot be run ({error})") from error
        program.logfile_read = file
        program.delayafterterminate = 2.0  # seconds: on a busy machine the default of 0.1 is too short
        try:
            yield Terminal(program, log)
        finally:
            program.terminate(force=True)
            program.close(force=True)
