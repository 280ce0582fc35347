"""Read prompts from files and data sets. Every kind of unusable source has its own error message."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from obliteratus.core.errors import UserError
from obliteratus.core.types import SPLITS, Prompt, PromptSet, Splits
from obliteratus.judge.behavior import load_behavior

# Columns that public data sets use for the user's turn. The first that exists is taken.
COLUMNS = ("prompt", "text", "instruction", "question", "goal", "query")
SUFFIXES = (".txt", ".jsonl", ".csv", ".parquet")


def load_prompts(
    target: str | Path, control: str | Path, bypass: str | Path | None = None, keep: str | Path | None = None
) -> PromptSet:
    """Load prompts that show the behavior (target), prompts that do not (control), and optional groups.

    A source is a text file (one prompt a line), JSONL, CSV or Parquet (a column named prompt, text, instruction,
    question, goal or query; optional category, split, system), ``hub:owner/name[:split[:column]]``,
    ``organism:NAME``, or ``behavior:NAME`` for the examples of a behavior. Raises UserError for a source that is
    missing, empty, binary or malformed, and for groups that are equal or share prompts.
    """
    sources = {"target": target, "control": control, "bypass": bypass, "keep": keep}
    groups = {name: _read(str(source), name) for name, source in sources.items() if source is not None}
    return check_prompts(PromptSet(groups), {k: str(v) for k, v in sources.items()})


def check_prompts(prompts: PromptSet, names: Mapping[str, str] | None = None) -> PromptSet:
    """Return the prompts, or raise UserError if target or control is missing or empty, or if they share prompts."""
    names = names or {group: group for group in prompts.groups}
    for group in {"target", "control"} - set(prompts.groups):
        raise UserError(f"prompts: the group '{group}' is missing; give --{group} SOURCE")
    for group, members in prompts.groups.items():
        if not members:
            raise UserError(f"{names[group]}: the group '{group}' is empty; give at least one prompt a line")
    texts = {group: {p.text for p in members} for group, members in prompts.groups.items()}
    if texts["target"] == texts["control"]:
        raise UserError(f"{names['target']}: target and control hold the same prompts; give two different files")
    both = texts["target"] & texts["control"]
    if both:
        raise UserError(
            f"{names['target']}: {len(both)} prompts are both in target and in control, such as "
            f"'{min(both)[:60]}'; remove them from one"
        )
    return prompts


def split_prompts(prompts: PromptSet, seed: int, uses_search_split: bool = False) -> Splits:
    """Split the prompts. Raises UserError if a group has no prompt in fit or report, or in search if that is used."""
    splits = prompts.split(seed)
    check_splits(splits, uses_search_split)
    return splits


def check_splits(splits: Splits, uses_search_split: bool = False) -> None:
    """Raise UserError if a group has no prompt in fit or report, or in search if that is used."""
    for name, part in zip(SPLITS, splits, strict=True):
        for group, members in part.groups.items():
            if not members and (uses_search_split or name != "search"):
                count = sum(len(other[group]) for other in splits)
                raise UserError(
                    f"prompts: the group '{group}' has no prompt in the {name} split "
                    f"({count} in all); give at least 8 prompts"
                )


def evenly_spaced(n: int, most: int) -> list[int]:
    """Return at most ``most`` of n indices, evenly spaced from 0, since prompts often come sorted by topic."""
    return [i * n // most for i in range(most)] if n > most else list(range(n))


def read_prompts(source: str | Path) -> tuple[Prompt, ...]:
    """Return the prompts of one source without duplicates. Raises UserError as `load_prompts` does."""
    return _read(str(source), "target")


# ------------------------------------------------------------------------------------------ sources
def _read(source: str, group: str) -> tuple[Prompt, ...]:
    if source.startswith("hub:"):
        rows = _from_hub(source)
    elif source.startswith("organism:"):
        from obliteratus.weights.organism import find_data_folder

        rows = _rows(find_data_folder(source.removeprefix("organism:")) / f"{group}.jsonl")
    elif source.startswith("behavior:"):
        rows = _rows(Path(_find_examples(source.removeprefix("behavior:"), group)))
    else:
        rows = _rows(Path(source))
    return tuple({p.text: p for p in (_prompt(row, source) for row in rows) if p.text}.values())


def _find_examples(behavior: str, group: str) -> str:
    """Return a behavior's own prompts. Raises UserError if it has none of this group."""
    head = load_behavior(behavior).head
    found = {"target": head.target, "control": head.control}.get(group, "")
    if not found:
        raise UserError(f"behavior:{behavior}: it has no {group} prompts; give a file, or see obliteratus behaviors")
    return found


def _rows(path: Path, column: str = "") -> Iterable[Mapping[str, Any]]:
    if not path.is_file():
        raise UserError(
            f"{path}: this prompt file does not exist; give a {', '.join(SUFFIXES)} file, "
            "hub:owner/name or organism:NAME"
        )
    if path.suffix == ".parquet":
        return _named(_parquet(path), path, column)
    text = _text(path)
    if path.suffix in (".jsonl", ".json"):
        return _named(_jsonl(text, path), path, column)
    if path.suffix == ".csv":
        return _named(list(csv.DictReader(io.StringIO(text))), path, column)
    return [{"prompt": line.strip()} for line in split_lines(text)]


def _text(path: Path) -> str:
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: the file is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    if "\0" in text:
        raise UserError(f"{path}: this is a binary file; give a text file with one prompt a line")
    if not text.strip():
        raise UserError(f"{path}: the prompt file is empty; give at least one prompt a line")
    return text


def split_lines(text: str) -> list[str]:
    """Return the lines of a text. Other signs at which Python ends one, such as U+2028, may stand inside a prompt."""
    return re.split(r"\r\n|\n|\r", text)


def _jsonl(text: str, path: Path) -> list[Any]:
    rows = []
    for number, line in enumerate(split_lines(text), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{path}:{number}: this line is not JSON ({error.msg}); write one object a line"
                ) from error
    return rows


def _parquet(path: Path) -> list[Any]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ModuleNotFoundError as error:
        raise UserError(f"{path}: reading Parquet needs pyarrow; pip install 'obliteratus[parquet]'") from error
    try:
        return list(parquet.read_table(path).to_pylist())
    except ArrowInvalid as error:
        raise UserError(f"{path}: the Parquet file cannot be read ({error}); write it again") from error


def _named(rows: list[Any], path: Path, column: str) -> list[Mapping[str, Any]]:
    """Return the rows with their prompt under the key ``prompt``."""
    if not rows:
        raise UserError(f"{path}: the prompt file is empty; give at least one row")
    if all(isinstance(row, str) for row in rows):
        return [{"prompt": row} for row in rows]
    if not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: rows must be objects with a prompt, or strings")
    name = next((c for c in ([column] if column else COLUMNS) if c in rows[0]), None)
    if name is None:
        what = f"no column '{column}'" if column else f"none of the columns {', '.join(COLUMNS)}"
        raise UserError(f"{path}: {what}; it has {', '.join(map(str, rows[0]))}; rename one")
    return [{**row, "prompt": row.get(name)} for row in rows]


def _prompt(row: Mapping[str, Any], source: str) -> Prompt:
    text = row["prompt"]
    if text is not None and not isinstance(text, str):
        raise UserError(f"{source}: a prompt is {type(text).__name__}, not text: {str(text)[:60]}")
    split = row.get("split") or ""
    if split and split not in SPLITS:
        split = ""  # public data sets have train and test here, which says nothing about our splits
    return Prompt((text or "").strip(), str(row.get("category") or ""), split, str(row.get("system") or ""))


def _from_hub(source: str) -> Iterable[Mapping[str, Any]]:
    """Return the rows of a data set, from its owner's files or from the hub's Parquet conversion."""
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    name, split, column = [*source.removeprefix("hub:").split(":"), "", ""][:3]
    try:
        for revision in ("main", "refs/convert/parquet"):
            files = HfApi().list_repo_files(name, repo_type="dataset", revision=revision)
            wanted = [f for f in files if f.endswith(SUFFIXES[1:]) and (split or "train") in f]
            if wanted:
                paths = [hf_hub_download(name, f, repo_type="dataset", revision=revision) for f in sorted(wanted)]
                return [row for path in paths for row in _rows(Path(path), column)]
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        raise UserError(
            f"{source}: the hub cannot be reached ({str(error).splitlines()[0]}); give a local file"
        ) from error
    raise UserError(
        f"{source}: there is no {', '.join(SUFFIXES[1:])} file of the split '{split or 'train'}'; name one that exists"
    )
