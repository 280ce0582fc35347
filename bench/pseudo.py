"""A program with menus, driven through a pseudo-terminal: wait for what it shows, type, and keep all of it in a log."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import termios
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from obliteratus.core.errors import UserError

ROWS, COLUMNS = 120, 200  # a menu of a hundred lines, and lines that do not wrap
CONTROL = re.compile(rb"\x1b\[[0-9;?]*[a-zA-Z]|\x1b[=>]|\r")
WHERE, HERE = b"\x1b[6n", b"\x1b[1;1R"  # a menu asks where the cursor is, and waits for the answer
DOWN, ENTER = "\x1b[B", "\r"
KEY_PAUSE = 0.3  # seconds: keys that come in one piece with an escape are taken for one key
ENDING = 10.0  # seconds that a program has to end after SIGTERM


class Terminal:
    """One running program. Make it with `terminal`."""

    def __init__(self, pid: int, fd: int, log: Path) -> None:
        self.pid, self.fd, self.log = pid, fd, log
        self.text, self.raw = "", b""

    def until(self, pattern: str, seconds: float) -> str:
        """What was shown since the last call, up to the first match and what came with it. UserError if none comes."""
        deadline = time.monotonic() + seconds
        while not re.search(pattern, self.text):
            if time.monotonic() > deadline or not self._read():
                tail = " / ".join(self.text.strip().splitlines()[-3:])
                raise UserError(
                    f"the program showed no '{pattern}' in {seconds:.0f} s or ended; last: {tail}; {self.log}"
                )
        shown, self.text = self.text, ""
        return shown

    def settled(self, quiet: float = 1.0) -> str:
        """What was shown since the last call, once nothing has come for so many seconds."""
        while select.select([self.fd], [], [], quiet)[0] and self._read():
            pass
        shown, self.text = self.text, ""
        return shown

    def keys(self, *keys: str) -> None:
        """Type, one key after the other."""
        for key in keys:
            os.write(self.fd, key.encode())
            time.sleep(KEY_PAUSE)

    def _read(self) -> bool:
        """Whether the program is still there, after at most a second of waiting for it."""
        if not select.select([self.fd], [], [], 1.0)[0]:
            return True
        try:
            piece = os.read(self.fd, 65536)
        except OSError:  # Linux says so when the other side is closed
            return False
        if WHERE in piece:
            os.write(self.fd, HERE)
        with self.log.open("ab") as file:
            file.write(piece)
        self.raw += piece
        whole, self.raw = _whole(self.raw)
        self.text += CONTROL.sub(b"", whole).decode(errors="replace")
        return bool(piece)


def _whole(raw: bytes) -> tuple[bytes, bytes]:
    """All of it but a sequence or a character that the next piece may end."""
    cut = raw.rfind(b"\x1b")
    if cut >= 0 and not CONTROL.match(raw, cut) and len(raw) - cut < 16:  # no sequence is longer
        return raw[:cut], raw[cut:]
    for size in range(1, min(4, len(raw)) + 1):  # a character has at most four bytes
        if raw[-size] >= 0xC0:
            need = 2 if raw[-size] < 0xE0 else 3 if raw[-size] < 0xF0 else 4
            return (raw[:-size], raw[-size:]) if size < need else (raw, b"")
        if raw[-size] < 0x80:
            break
    return raw, b""


@contextmanager
def terminal(command: Sequence[str], folder: Path, extra: Mapping[str, str], log: Path) -> Iterator[Terminal]:
    """Run the command in the folder; afterwards it is ended, if it has not ended by itself."""
    environment = {**os.environ, **extra, "TERM": "xterm", "COLUMNS": str(COLUMNS), "LINES": str(ROWS)}
    pid, fd = pty.fork()
    if pid == 0:
        try:
            os.chdir(folder)
            os.execvpe(command[0], list(command), environment)
        finally:
            os._exit(127)  # what a shell says of a command that is not there
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    try:
        yield Terminal(pid, fd, log)
    finally:
        _end(pid)
        os.close(fd)


def _end(pid: int) -> None:
    """Ask it to end, and after a while make it."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + ENDING
        if os.waitpid(pid, os.WNOHANG)[0]:
            return
        os.kill(pid, number)
        while time.monotonic() < deadline:
            if os.waitpid(pid, os.WNOHANG)[0]:
                return
            time.sleep(0.05)
