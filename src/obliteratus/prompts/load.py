"""Load the groups of prompts from their sources."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from obliteratus.core.types import Prompt, PromptSet
from obliteratus.prompts.checks import check_prompts
from obliteratus.prompts.duplicates import drop_duplicates
from obliteratus.prompts.memory import read_memory
from obliteratus.prompts.sources import Loaded, read_source

PromptSource = str | Path | Iterable[Any]
"""A source by name, or prompts in memory."""


def load_prompts(
    target: PromptSource,
    control: PromptSource,
    bypass: PromptSource | None = None,
    keep: PromptSource | None = None,
    column: str | Mapping[str, str] = "",
    benign: PromptSource | None = None,
) -> PromptSet:
    """Load prompts that show the behavior (target), prompts that do not (control), and optional groups.

    A source by name is a text file (one prompt a line), JSON, JSON lines, CSV, TSV or Parquet,
    ``hub:owner/name[@revision][:configuration][:split][:column]``, ``organism:NAME``, or ``behavior:NAME`` for the
    examples of a behavior. A row's prompt is in one of the usual columns (see `columns.COLUMNS`), as text or as a
    conversation, whose last user turn is asked behind the turns before it; ``category``, ``split`` and ``system`` are
    optional. A source that ends in ``?COLUMN=VALUE`` stands for the rows with that value. A source in memory is a list
    of texts, prompts, rows or conversations, or a data frame of pandas or polars. column: the column of the prompts,
    for all groups or by group. benign: prompts that should be answered, but look like some that should not.
    Raises UserError for a source that is missing, empty, binary or malformed, and for groups that `check_prompts`
    refuses.

    >>> ob.load_prompts(target=["Why do stars twinkle?", "What is a comet?"], control=["How do I bake bread?"])
    <PromptSet: 2 target, 1 control prompts>
    """
    sources = {"target": target, "control": control, "bypass": bypass, "keep": keep, "benign": benign}
    columns = dict.fromkeys(sources, column) if isinstance(column, str) else column
    loaded = {
        name: _read(source, name, columns.get(name, "")) for name, source in sources.items() if source is not None
    }
    origins = {name: found.source for name, found in loaded.items()}
    return check_prompts(PromptSet({name: found.prompts for name, found in loaded.items()}, sources=origins), origins)


def _read(source: PromptSource, group: str, column: str) -> Loaded:
    if isinstance(source, str | Path):
        return read_source(str(source), group, column)
    return Loaded(*read_memory(source, group, column))


def read_prompts(source: str | Path, column: str = "") -> tuple[Prompt, ...]:
    """Return the prompts of one source without duplicates. Raises UserError as `load_prompts` does."""
    return drop_duplicates(PromptSet({"prompts": read_source(str(source), "target", column).prompts}))["prompts"]
