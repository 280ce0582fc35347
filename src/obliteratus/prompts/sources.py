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
from obliteratus.core.types import SPLITS, Prompt
from obliteratus.judge.behavior import load_behavior

# Columns that public data sets use for the user's turn. The first that exists is taken.
COLUMNS = ("prompt", "text", "instruction", "question", "goal", "query")
SUFFIXES = (".txt", ".jsonl", ".csv", ".parquet")


def read_source(source: str, group: str) -> tuple[Prompt, ...]:
    """Return the prompts of one source in their order, with duplicates. Raises UserError as `load_prompts` does.

    group: which prompts of an organism or behavior.
    """
    if source.startswith("hub:"):
        rows = _from_hub(source)
    elif source.startswith("organism:"):
        from obliteratus.weights.organism import find_data_folder

        rows = _rows(find_data_folder(source.removeprefix("organism:")) / f"{group}.jsonl")
    elif source.startswith("behavior:"):
        rows = _rows(Path(_find_examples(source.removeprefix("behavior:"), group)))
    else:
        rows = _rows(Path(source))
    return tuple(p for p in (_prompt(row, source) for row in rows) if p.text)


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
