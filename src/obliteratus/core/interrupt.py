"""What Ctrl-C and SIGTERM do: they end the process while it starts, and raise KeyboardInterrupt in a command."""

import os
import signal
import sys
from types import FrameType

INTERRUPTED = 130  # 128 + the number of SIGINT, as shells expect
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def leave(number: int, frame: FrameType | None) -> None:
    """End the process at once. Nothing has been written yet."""
    sys.stderr.write("interrupted; nothing was written\n")
    sys.stderr.flush()
    os._exit(INTERRUPTED)


def leave_on_interrupt() -> None:
    """Let the signals end the process. One that the caller ignores, as a shell does for its background jobs, stays
    ignored."""
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, leave)


def raise_on_interrupt() -> None:
    """Let the signals raise KeyboardInterrupt where `leave_on_interrupt` was called before."""
    for number in SIGNALS:
        if signal.getsignal(number) is leave:
            signal.signal(number, signal.default_int_handler)
