"""Prompts that are in memory: lists of texts, prompts, rows or conversations, and data frames."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

from obliteratus.core.errors import UserError
from obliteratus.core.types import Prompt
from obliteratus.prompts.columns import make_prompts
from obliteratus.prompts.files import make_row


def read_memory(source: object, group: str, column: str = "") -> tuple[tuple[Prompt, ...], str]:
    """Return the prompts of a list, a data frame of pandas or polars, or anything else that gives rows, and its name.

    An item is a text, a `Prompt`, a row (a mapping of columns) or a conversation (a list of turns). Raises UserError as
    `load_prompts` does, with the number of the item.
    """
    kind, items = _list_items(source, group)
    if not items:
        raise UserError(f"{group}: the {kind} is empty; give at least one prompt")
    if all(isinstance(item, Prompt) for item in items):
        return tuple(items), f"{kind} of {len(items)}"
    rows = [make_row(item, f"{group}, item {number}") for number, item in enumerate(items, 1)]
    return make_prompts(rows, group, column), f"{kind} of {len(items)}"


def _list_items(source: object, group: str) -> tuple[str, list[Any]]:
    """Return what kind of source it is, and its items."""
    for library, name in (("pandas", "DataFrame"), ("polars", "DataFrame")):
        if library in sys.modules and isinstance(source, getattr(sys.modules[library], name)):
            return "data frame", _list_frame_rows(source, library)
    if isinstance(source, Mapping | bytes) or not isinstance(source, Iterable):
        raise UserError(
            f"{group}: {type(source).__name__} holds no prompts; give a file or another source by name, a list of "
            "texts, or a data frame"
        )
    return "list", list(source)


def _list_frame_rows(frame: Any, library: str) -> list[Any]:
    """Return the rows of a data frame as mappings, with None for what is missing."""
    if library == "polars":
        return list(frame.to_dicts())
    return list(frame.astype(object).where(frame.notna(), None).to_dict("records"))
