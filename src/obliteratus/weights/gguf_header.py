"""Reading the header of a GGUF file, which holds the vocabulary and is long."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import gguf


@contextmanager
def parse_header_once() -> Iterator[None]:
    """Inside, or in a function that this decorates, the header of a GGUF file is parsed once.

    transformers parses it for the configuration, the tokenizer and the weights each, at 10 s each for Gemma 3's
    vocabulary of 262,144 tokens.
    """
    library: Any = gguf  # transformers looks the reader up in its module at each call
    reader = library.GGUFReader
    library.GGUFReader = lru_cache(maxsize=1)(reader)
    try:
        yield
    finally:
        library.GGUFReader = reader
