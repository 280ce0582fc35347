"""Read the rows of a prompt file: text, JSON, JSON lines, CSV, TSV or Parquet. The suffix says which."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from obliteratus.core.choices import PROMPT_SUFFIXES, check_prompt_file
from obliteratus.core.errors import UserError


@dataclass(frozen=True)
class Row:
    """One row of a prompt file."""

    where: str
    """File and line, for messages."""
    fields: Mapping[str, Any]
    """By column. Lines and strings have the one column ``prompt``, lists of turns the one column ``messages``."""


def read_rows(path: Path, is_prompt_column: Callable[[str], bool]) -> list[Row]:
    """Return the rows of a file. Raises UserError with file and line if it is missing, or not what its suffix says.

    is_prompt_column: whether a column of that name holds prompts, by which a CSV file's delimiter is found.
    """
    check_prompt_file(path)
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _number(path, _read_parquet(path), "row")
    if suffix in (".csv", ".tsv"):
        return _read_csv(_read_text(path), path, "\t" if suffix == ".tsv" else "", is_prompt_column)
    if suffix in (".json", ".jsonl", ".ndjson"):
        return _read_json(_read_text(path), path)
    if suffix in ("", ".txt"):
        lines = enumerate(split_lines(_read_text(path)), 1)
        return [Row(f"{path}:{number}", {"prompt": line}) for number, line in lines if line.strip()]
    raise UserError(f"{path}: '{path.suffix}' files are not read; give a {', '.join(PROMPT_SUFFIXES)} file")


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: the file cannot be read ({error.strerror}); give one that can") from error
    utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))  # as spreadsheets save "Unicode text"
    try:
        text = data.decode("utf-16" if utf16 else "utf-8-sig")
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


def _number(path: Path, rows: Sequence[Any], kind: str) -> list[Row]:
    return [make_row(row, f"{path}, {kind} {number}") for number, row in enumerate(rows, 1)]


def make_row(row: Any, where: str) -> Row:
    """Return what a file or a list has as one row. Raises UserError for what is neither text, turns nor a mapping."""
    if isinstance(row, str):
        return Row(where, {"prompt": row})
    if isinstance(row, list):
        return Row(where, {"messages": row})
    if not isinstance(row, Mapping):
        raise UserError(f"{where}: rows must be objects with a prompt, or strings, and this is {str(row)[:40]}")
    return Row(where, row)


# -------------------------------------------------------------------------------------------------- JSON
def _read_json(text: str, path: Path) -> list[Row]:
    """Return the items of one array, or of one value a line."""
    lines = [(f"{path}:{n}", line) for n, line in enumerate(split_lines(text), 1) if line.strip()]
    if text.lstrip().startswith("[") and (len(lines) == 1 or not _is_json(lines[0][1])):
        return _number(path, _parse_json(text, str(path)) or _refuse_empty(path), "item")
    return [make_row(_parse_json(line, where), where) for where, line in lines]


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f"{where}:{error.lineno}" if error.lineno > 1 else where
        raise UserError(
            f"{line}: this line is not JSON ({error.msg}); write an array of rows, or one object a line"
        ) from error
    except (ValueError, RecursionError) as error:  # numbers of over 4 300 digits, and nesting without end
        raise UserError(f"{where}: this JSON cannot be read ({str(error)[:80]}); mend it") from error


# --------------------------------------------------------------------------------------------------- CSV
def _read_csv(text: str, path: Path, delimiter: str, is_prompt_column: Callable[[str], bool]) -> list[Row]:
    """Return the rows. An empty delimiter is found: the first of , ; and tab that gives a column of prompts."""
    text = "\n".join(split_lines(text))
    kinds = [delimiter] if delimiter else [",", ";", "\t"]
    headers = {kind: _split_header(text, kind) for kind in kinds}
    found = next((kind for kind in kinds if any(map(is_prompt_column, headers[kind]))), kinds[0])
    header = headers[found]
    if twice := [name for name in header if header.count(name) > 1]:
        raise UserError(f"{path}:1: two columns are called '{twice[0]}'; rename one")
    rows = _read_cells(text, path, found)[1:] or _refuse_empty(path)
    for where, cells in rows:
        _check_width(cells, header, where, found)
    return [Row(where, dict(zip(header, cells, strict=True))) for where, cells in rows]


def _refuse_empty(path: Path) -> NoReturn:
    raise UserError(f"{path}: the prompt file is empty; give at least one row")


def _split_header(text: str, delimiter: str) -> list[str]:
    line = next(line for line in text.split("\n") if line.strip())
    try:
        return [name.strip() for name in next(csv.reader([line], delimiter=delimiter))]
    except csv.Error:
        return []


def _read_cells(text: str, path: Path, delimiter: str) -> list[tuple[str, list[str]]]:
    """Return where each row begins, and its cells. Empty lines are no rows."""
    limit = csv.field_size_limit(max(len(text), 1))  # its default of 131 072 characters is no limit of prompts
    reader = csv.reader(io.StringIO(text), delimiter=delimiter, strict=True)
    rows, begun = [], 1
    try:
        for cells in reader:
            rows += [(f"{path}:{begun}", cells)] if any(cell.strip() for cell in cells) else []
            begun = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{path}:{begun}: this row is not CSV ({error}); close its quotes, and double those inside"
        ) from error
    finally:
        csv.field_size_limit(limit)
    return rows


def _check_width(cells: list[str], header: list[str], where: str, delimiter: str) -> None:
    """Raise UserError if a row is wider or narrower than the header: then a prompt was cut in two."""
    if len(cells) != len(header):
        name = {",": "comma", ";": "semicolon", "\t": "tab"}[delimiter]
        raise UserError(
            f"{where}: this row has {len(cells)} fields and the header {len(header)}; put a text with a {name} into "
            "double quotes"
        )


def _read_parquet(path: Path) -> list[Any]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ModuleNotFoundError as error:
        raise UserError(f"{path}: reading Parquet needs pyarrow; pip install 'obliteratus[parquet]'") from error
    try:
        rows = list(parquet.read_table(path).to_pylist())
    except (ArrowInvalid, OSError) as error:
        cause = " ".join(str(error).split())[:120]
        raise UserError(f"{path}: the Parquet file cannot be read ({cause}); write it again") from error
    return rows or _refuse_empty(path)
