"""Keep other libraries' messages off the terminal where they say nothing that a user can act on."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from contextvars import ContextVar
from io import StringIO

LOGGERS = ("huggingface_hub", "bitsandbytes", "peft", "accelerate", "gguf", "lm_eval", "datasets", "evaluate")
WARNINGS = "lm_eval|datasets|torch|transformers|peft|bitsandbytes|accelerate|huggingface_hub|gguf"
_hushed: ContextVar[bool] = ContextVar("hushed", default=False)


def hush_libraries() -> None:
    """Show only errors of other libraries from now on. The command line does so unless it is to be verbose."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    for library in LOGGERS:
        logging.getLogger(library).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=WARNINGS)
    _hushed.set(True)


@contextmanager
def hushed_stderr() -> Iterator[None]:
    """Drop what libraries print to stderr inside the block, such as bars of their own, if they are hushed."""
    if not _hushed.get():
        yield
        return
    with redirect_stderr(StringIO()):
        yield
