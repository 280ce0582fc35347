"""Where a chat reads its lines and shows its answers: a terminal with history, or plain pipes."""

from __future__ import annotations

import io
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from obliteratus.cli.flow import flow, place_side_by_side
from obliteratus.cli.terminal import notes, results
from obliteratus.core.progress import note

HISTORY_LINES = 1000
NARROWEST = 60  # columns; in fewer, two answers side by side have hardly room for words


class Pipe:
    """Plain text: a line of stdin is a turn, an answer goes to stdout as it is, and everything else to stderr."""

    interactive = False

    def __init__(self) -> None:
        self.answered = False

    def read(self, prompt: str) -> str:
        """Return the next line, without its end. Raises EOFError at the end of the input."""
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\r\n")

    def say(self, text: str) -> None:
        """Show a line about the chat itself."""
        sys.stderr.write(f"{text}\n")

    def complain(self, text: str) -> None:
        """Show a line about what went wrong."""
        self.say(text)

    def show(self, pieces: Iterable[str]) -> None:
        """Show an answer while it is written. A blank line separates it from the one before."""
        sys.stdout.write("\n" if self.answered else "")
        self.answered = True
        self.write(pieces)
        sys.stdout.write("\n")
        sys.stdout.flush()

    def write(self, pieces: Iterable[str]) -> None:
        """Write pieces as they come."""
        for piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()

    def show_beside(self, left: tuple[str, Iterable[str]], right: tuple[str, Iterable[str]]) -> None:
        """Show two answers, each under its title, one after the other."""
        for title, pieces in (left, right):
            self.show([f"{title}:"])
            self.write(pieces)
            sys.stdout.write("\n")
            sys.stdout.flush()


class Screen(Pipe):
    """A terminal: lines are edited and remembered, and answers broken between words."""

    interactive = True

    @property
    def width(self) -> int:
        """Columns that text may take; the last one stays free, since some terminals break lines behind it."""
        return max(20, shutil.get_terminal_size().columns - 1)

    @property
    def styled(self) -> bool:
        """Whether to set bold and dim: not in a dumb terminal, and not under NO_COLOR."""
        return results.color_system is not None and not results.no_color

    def read(self, prompt: str) -> str:
        """Return the next line. Raises EOFError for Ctrl-D."""
        sys.stdout.write("\n")
        try:
            # Readline must not count what it does not show.
            return input(f"\001\033[1m\002{prompt}\001\033[0m\002" if self.styled else prompt)
        except EOFError:
            sys.stdout.write("\n")
            raise

    def say(self, text: str) -> None:
        """Show a line about the chat itself, dimmed."""
        notes.print(text, style="dim" if self.styled else "", markup=False)

    def complain(self, text: str) -> None:
        """Show a line about what went wrong."""
        notes.print(text, markup=False)

    def show(self, pieces: Iterable[str]) -> None:
        """Show an answer while it is written."""
        try:
            self.write(flow(pieces, self.width))
        finally:
            sys.stdout.write("\n")
            sys.stdout.flush()

    def show_beside(self, left: tuple[str, Iterable[str]], right: tuple[str, Iterable[str]]) -> None:
        """Show two answers side by side, line by line while they are written."""
        if self.width < NARROWEST:
            for title, pieces in (left, right):
                self.say(title)
                self.show(pieces)
            return
        titles = place_side_by_side([left[0]], [right[0]], self.width)
        results.print("\n".join(titles), style="bold" if self.styled else "", markup=False)
        self.write(f"{line}\n" for line in place_side_by_side(left[1], right[1], self.width))


@contextmanager
def open_screen() -> Iterator[Pipe]:
    """Yield a screen if both ends are a terminal, else a pipe. Lines typed are kept for later chats.

    Bytes that are no text in the terminal's encoding are read as their codes, such as ``\\xff``.
    """
    cast(io.TextIOWrapper, sys.stdin).reconfigure(errors="backslashreplace")
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        try:
            yield Pipe()
        except BrokenPipeError:  # who reads the answers has read enough, as head does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more at the end
        return
    with _remember_lines(find_history()):
        yield Screen()


def find_history() -> Path:
    """Return the file of lines typed: in $XDG_STATE_HOME/obliteratus or ~/.local/state/obliteratus."""
    shared = Path(os.environ.get("XDG_STATE_HOME", ""))
    return (shared if shared.is_absolute() else Path.home() / ".local" / "state") / "obliteratus" / "chat_history"


@contextmanager
def _remember_lines(file: Path) -> Iterator[None]:
    """Let arrow keys edit lines and bring back those of earlier chats, which the file keeps."""
    try:
        import readline  # which input() then uses; Windows has none
    except ImportError:
        yield
        return
    if file.is_file():
        try:
            readline.read_history_file(file)
        except OSError as error:
            note(
                "history", f"{file} cannot be read ({error.strerror}): the arrow keys bring back this chat's lines only"
            )
    readline.set_history_length(HISTORY_LINES)
    try:
        yield
    finally:
        _write_history(readline.write_history_file, file)


def _write_history(write: object, file: Path) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)  # what people ask is theirs alone
        write(file)  # type: ignore[operator]
    except OSError as error:
        notes.print(f"the lines typed were not kept: {file}: {error.strerror}", markup=False)
