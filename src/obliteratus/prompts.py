"""Prompt sources to a PromptSet, with every kind of unusable file named."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from obliteratus.core.errors import UserError
from obliteratus.core.types import SPLITS, Prompt, PromptSet

# Columns that public data sets use for the user's turn, the plainest name first.
COLUMNS = ("prompt", "text", "instruction", "question", "goal", "query")
SUFFIXES = (".txt", ".jsonl", ".csv", ".parquet")


def load_prompts(
    target: str | Path, control: str | Path, bypass: str | Path | None = None, keep: str | Path | None = None
) -> PromptSet:
    """Prompts that show the behaviour (target), that do not (control), and optional groups.

    A source is a text file (one prompt a line), JSONL, CSV or Parquet (a column named prompt, text, instruction,
    question, goal or query; optional category, split, system), ``hub:owner/name[:split[:column]]``, or
    ``organism:NAME``. Raises UserError for a source that is missing, empty, binary or malformed, and for groups
    that are equal or share prompts.
    """
    sources = {"target": target, "control": control, "bypass": bypass, "keep": keep}
    groups = {name: _read(str(source), name) for name, source in sources.items() if source is not None}
    return check_prompts(PromptSet(groups), {k: str(v) for k, v in sources.items()})


def check_prompts(prompts: PromptSet, names: Mapping[str, str] | None = None) -> PromptSet:
    """The same prompts, if target and control are there, not empty, and share nothing."""
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
            f"{names['target']}: {len(both)} prompts stand in target and in control, the first is "
            f"'{min(both)[:60]}'; remove them from one"
        )
    return prompts


def parts_checked(prompts: PromptSet, seed: int, searched: bool = False) -> tuple[PromptSet, PromptSet, PromptSet]:
    """fit, search, report; UserError where fit or report (and search, if it is ``searched``) has an empty group."""
    parts = prompts.split(seed)
    for name, part in zip(SPLITS, parts, strict=True):
        for group, members in part.groups.items():
            if not members and (searched or name != "search"):
                raise UserError(
                    f"prompts: the group '{group}' leaves no prompt for the {name} part "
                    f"({len(prompts[group])} in all); give more, at least 8"
                )
    return parts


def evenly_spaced(n: int, most: int) -> list[int]:
    """At most so many of n places, evenly spaced from 0: prompts often come sorted by what they are about."""
    return [i * n // most for i in range(most)] if n > most else list(range(n))


def read_prompts(source: str | Path) -> tuple[Prompt, ...]:
    """All prompts of one source, as of `load_prompts`, each once. Raises UserError."""
    return _read(str(source), "target")


# ------------------------------------------------------------------------------------------ sources
def _read(source: str, group: str) -> tuple[Prompt, ...]:
    if source.startswith("hub:"):
        rows = _from_hub(source)
    elif source.startswith("organism:"):
        from obliteratus.weights.organism import data_folder

        rows = _rows(data_folder(source.removeprefix("organism:")) / f"{group}.jsonl")
    else:
        rows = _rows(Path(source))
    return tuple({p.text: p for p in (_prompt(row, source) for row in rows) if p.text}.values())


def _rows(path: Path, column: str = "") -> Iterable[Mapping[str, Any]]:
    if not path.is_file():
        raise UserError(
            f"{path}: no such prompt file; give a {', '.join(SUFFIXES)} file, hub:owner/name or organism:NAME"
        )
    if path.suffix == ".parquet":
        return _named(_parquet(path), path, column)
    text = _text(path)
    if path.suffix in (".jsonl", ".json"):
        return _named(_jsonl(text, path), path, column)
    if path.suffix == ".csv":
        return _named(list(csv.DictReader(io.StringIO(text))), path, column)
    return [{"prompt": line.strip()} for line in text.splitlines()]


def _text(path: Path) -> str:
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    if "\0" in text:
        raise UserError(f"{path}: a binary file, not text; give one prompt a line")
    if not text.strip():
        raise UserError(f"{path}: the prompt file is empty; give at least one prompt a line")
    return text


def _jsonl(text: str, path: Path) -> list[Any]:
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise UserError(f"{path}:{number}: not JSON ({error.msg}); one object a line") from error
    return rows


def _parquet(path: Path) -> list[Any]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ModuleNotFoundError as error:
        raise UserError(f"{path}: Parquet needs pyarrow; pip install 'obliteratus[parquet]'") from error
    try:
        return list(parquet.read_table(path).to_pylist())
    except ArrowInvalid as error:
        raise UserError(f"{path}: not a readable Parquet file ({error}); write it again") from error


def _named(rows: list[Any], path: Path, column: str) -> list[Mapping[str, Any]]:
    """Rows with their prompt under the key ``prompt``."""
    if not rows:
        raise UserError(f"{path}: the prompt file is empty; give at least one row")
    if all(isinstance(row, str) for row in rows):
        return [{"prompt": row} for row in rows]
    if not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: rows must be objects with a prompt, or strings")
    found = next((c for c in ([column] if column else COLUMNS) if c in rows[0]), None)
    if found is None:
        what = f"no column '{column}'" if column else f"none of the columns {', '.join(COLUMNS)}"
        raise UserError(f"{path}: {what}; it has {', '.join(map(str, rows[0]))}; rename one")
    return [{**row, "prompt": row.get(found)} for row in rows]


def _prompt(row: Mapping[str, Any], source: str) -> Prompt:
    text = row["prompt"]
    if text is not None and not isinstance(text, str):
        raise UserError(f"{source}: a prompt is {type(text).__name__}, not text: {str(text)[:60]}")
    split = row.get("split") or ""
    if split and split not in SPLITS:
        split = ""  # public sets carry train/test here, which says nothing about our parts
    return Prompt((text or "").strip(), str(row.get("category") or ""), split, str(row.get("system") or ""))


def _from_hub(source: str) -> Iterable[Mapping[str, Any]]:
    """A data set's files, as its owner stores them or as the hub converts them to Parquet."""
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
            f"{source}: the hub cannot be read ({str(error).splitlines()[0]}); give a local file"
        ) from error
    raise UserError(
        f"{source}: no {', '.join(SUFFIXES[1:])} file of the split '{split or 'train'}'; name a split that exists"
    )
