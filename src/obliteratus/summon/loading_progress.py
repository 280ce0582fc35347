"""Show transformers' loading of weights, which counts them for a bar of its own, as progress of ours."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

from transformers.utils import logging as transformers_logging

from obliteratus.core.progress import progress

LOADING = "Loading weights"  # what transformers calls this bar of its


@contextmanager
def weights_progress(title: str) -> Iterator[None]:
    """Show the loading of weights inside the block under this title."""

    def make_bar(factory: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        return _count(title, args[0]) if options.get("desc") == LOADING else factory(*args, **options)

    previous = transformers_logging.set_tqdm_hook(make_bar)
    try:
        yield
    finally:
        transformers_logging.set_tqdm_hook(previous)


def _count(title: str, items: Collection[Any]) -> Iterator[Any]:
    with progress(title, len(items)) as advance:
        for item in items:
            yield item
            advance(1)
