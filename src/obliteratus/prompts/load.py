"""Load the groups of prompts from their sources."""

from __future__ import annotations

from pathlib import Path

from obliteratus.core.types import Prompt, PromptSet
from obliteratus.prompts.checks import check_prompts
from obliteratus.prompts.duplicates import drop_duplicates
from obliteratus.prompts.sources import read_source


def load_prompts(
    target: str | Path, control: str | Path, bypass: str | Path | None = None, keep: str | Path | None = None
) -> PromptSet:
    """Load prompts that show the behavior (target), prompts that do not (control), and optional groups.

    A source is a text file (one prompt a line), JSONL, CSV or Parquet (a column named prompt, text, instruction,
    question, goal or query; optional category, split, system), ``hub:owner/name[:split[:column]]``,
    ``organism:NAME``, or ``behavior:NAME`` for the examples of a behavior. Raises UserError for a source that is
    missing, empty, binary or malformed, and for groups that `check_prompts` refuses.
    """
    sources = {"target": target, "control": control, "bypass": bypass, "keep": keep}
    groups = {name: read_source(str(source), name) for name, source in sources.items() if source is not None}
    return check_prompts(PromptSet(groups), {k: str(v) for k, v in sources.items()})


def read_prompts(source: str | Path) -> tuple[Prompt, ...]:
    """Return the prompts of one source without duplicates. Raises UserError as `load_prompts` does."""
    return drop_duplicates(PromptSet({"prompts": read_source(str(source), "target")}))["prompts"]
