"""Read the prompts of one source: a file, a data set on the hub, a model organism or a behavior."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from obliteratus.core.choices import split_condition
from obliteratus.core.errors import UserError
from obliteratus.core.types import Prompt
from obliteratus.judge.behavior import load_behavior
from obliteratus.prompts.columns import is_prompt_column, make_prompts, select_rows
from obliteratus.prompts.files import read_rows
from obliteratus.prompts.hub import fetch_hub_files


class Loaded(NamedTuple):
    """The prompts of a source."""

    prompts: tuple[Prompt, ...]
    """In their order, with duplicates."""
    source: str
    """Where they come from; a data set on the hub with its revision."""


def read_source(source: str, group: str, column: str = "") -> Loaded:
    """Return the prompts of one source. Raises UserError as `load_prompts` does.

    group: which prompts of an organism or behavior. column: of a file or data set; see `make_prompts`. A source may end
    in ``?COLUMN=VALUE``, which takes only the rows that have this value there.
    """
    source, condition = split_condition(source)
    if source.startswith("hub:"):
        found = fetch_hub_files(source)
        name = f"{found.source}?{condition}" if condition else found.source
        return Loaded(_read_files(found.paths, found.source, found.column or column, condition), name)
    if source.startswith("organism:"):
        from obliteratus.weights.organism_files import find_data_folder

        path = find_data_folder(source.removeprefix("organism:")) / f"{group}.jsonl"
    elif source.startswith("behavior:"):
        path = Path(_find_examples(source.removeprefix("behavior:"), group))
    else:
        path = Path(source)
    name = f"{source}?{condition}" if condition else source
    return Loaded(_read_files([path], source, column, condition), name)


def _read_files(paths: Sequence[Path], source: str, column: str, condition: str) -> tuple[Prompt, ...]:
    rows = [row for path in paths for row in read_rows(path, lambda name: is_prompt_column(name, column))]
    return make_prompts(select_rows(rows, source, condition), source, column)


def _find_examples(behavior: str, group: str) -> str:
    """Return a behavior's own prompts. Raises UserError if it has none of this group."""
    head = load_behavior(behavior).head
    found = {"target": head.target, "control": head.control, "keep": head.keep}.get(group, "")
    if not found:
        raise UserError(f"behavior:{behavior}: it has no {group} prompts; give a file, or see obliteratus behaviors")
    return found
