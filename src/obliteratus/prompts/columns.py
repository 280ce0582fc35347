"""Turn rows of a file into prompts: which column holds them, and what else a row says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from obliteratus.core.chat import Turn
from obliteratus.core.errors import UserError
from obliteratus.core.progress import note
from obliteratus.core.types import SPLITS, Prompt
from obliteratus.prompts.conversations import read_conversation
from obliteratus.prompts.files import Row

# Columns in which public data sets keep the user's turn, or the conversation that ends with it. The first that a file
# has is taken; a data set with goals and behaviors (JailbreakBench) has the sentence in the goal.
COLUMNS = (
    *("prompt", "instruction", "question", "goal", "query", "forbidden_prompt", "behavior", "request"),
    *("messages", "conversations", "conversation", "text"),
)
# Where data sets of safe prompts that are refused keep the kind of a prompt: OR-Bench and PHTest, XSTest.
CATEGORIES = ("category", "type")
# What Alpaca and Dolly put beside an instruction, and which belongs to it.
INPUTS = ("input", "context")


def is_prompt_column(name: str, column: str = "") -> bool:
    """Return whether a column of that name holds prompts. column: the only one that does, if given."""
    return name == column if column else _fold(name) in COLUMNS


def make_prompts(rows: Sequence[Row], source: str, column: str = "") -> tuple[Prompt, ...]:
    """Return the prompt of each row that has text, and note what is left out.

    column: the column of the prompts; empty: the first of `COLUMNS` that the first row has, in any case. Raises
    UserError with the row if it has no such column, or something other than text in it.
    """
    name = _choose_column(rows[0], source, column)
    prompts = [_make_prompt(row, name) for row in rows]
    if empty := sum(not p.text for p in prompts):
        note("prompts", f"{source}: {empty} of {len(rows)} rows have no text and are left out")
    _note_splits(rows, source)
    _note_categories(rows, source)
    return tuple(p for p in prompts if p.text)


def select_rows(rows: Sequence[Row], source: str, condition: str) -> Sequence[Row]:
    """Return the rows whose column has the value of a condition such as ``label=safe``; all without a condition.

    Capitals make no difference. Raises UserError for a condition that is none, a column that there is not, and a value
    that no row has.
    """
    if not condition:
        return rows
    column, sign, value = (part.strip() for part in condition.partition("="))
    if not column or not sign or not value:
        raise UserError(f"{source}?{condition}: behind the sign ? goes COLUMN=VALUE, such as label=safe")
    values = [{_fold(name): v for name, v in row.fields.items()}.get(_fold(column)) for row in rows]
    if all(v is None for v in values):
        raise UserError(f"{source}?{condition}: there is no column '{column}'; it has {_list(rows[0].fields)}")
    if found := [row for row, v in zip(rows, values, strict=True) if _fold(v) == _fold(value)]:
        return found
    known = dict.fromkeys(str(v) for v in values if v is not None)
    raise UserError(f"{source}?{condition}: no row has this value; {column} is {_list(known)}")


def _fold(name: Any) -> str:
    return str(name).strip().lower()


def _choose_column(first: Row, source: str, column: str) -> str:
    if column:
        if column not in first.fields:
            raise UserError(f"{source}: there is no column '{column}'; it has {_list(first.fields)}")
        return column
    found = sorted((n for n in first.fields if is_prompt_column(str(n))), key=lambda n: COLUMNS.index(_fold(n)))
    if not found:
        raise UserError(
            f"{source}: none of the columns {', '.join(COLUMNS)}; it has {_list(first.fields)}; choose with --column"
        )
    if len(found) > 1:
        others = ", ".join(f"'{other}'" for other in found[1:])
        note("prompts", f"{source}: the prompts are in '{found[0]}', not in {others}; --column chooses another")
    return found[0]


def _list(names: Mapping[str, Any]) -> str:
    return ", ".join(map(str, names))[:200] or "none"


def _make_prompt(row: Row, column: str) -> Prompt:
    if column not in row.fields:
        raise UserError(
            f"{row.where}: this row has no '{column}', as the first has; it has {_list(row.fields)}: name all alike"
        )
    others = {_fold(name): value for name, value in row.fields.items()}
    value, system = row.fields[column], _text_of(others.get("system"), "system", row)
    history: tuple[Turn, ...] = ()
    if isinstance(value, list):
        spoken, history, text = read_conversation(value, row.where)
        system = spoken or system
    else:
        text = _text_of(value, column, row)
        if _fold(column) == "instruction":
            text = "\n\n".join(part for part in (text, *(_text_of(others.get(i), i, row) for i in INPUTS)) if part)
    split, category = others.get("split"), next((others[c] for c in CATEGORIES if others.get(c) is not None), None)
    prompt = Prompt(text, "" if category is None else str(category), split if split in SPLITS else "", system, history)
    _check_encodable(prompt, row)
    return prompt


def _text_of(value: Any, column: str, row: Row) -> str:
    if value is not None and not isinstance(value, str):
        what = "a prompt" if is_prompt_column(column) else f"'{column}'"
        raise UserError(f"{row.where}: {what} is {type(value).__name__}, not text: {str(value)[:60]}")
    return (value or "").strip()


def _check_encodable(prompt: Prompt, row: Row) -> None:
    """Raise UserError for half of a surrogate pair, such as JSON's "\\ud800", which no tokenizer or file can hold."""
    for text in (prompt.text, prompt.system, prompt.category, *(turn.content for turn in prompt.history)):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            code = f"U+{ord(text[error.start]):04X}"
            raise UserError(f"{row.where}: half of a surrogate pair ({code}) is no character; remove it") from error


def _note_categories(rows: Sequence[Row], source: str) -> None:
    """Note that categories are taken from another column than ``category``."""
    first = {_fold(name): name for name in rows[0].fields}
    if CATEGORIES[0] not in first and CATEGORIES[1] in first:
        note("prompts", f"{source}: the prompts' categories are in '{first[CATEGORIES[1]]}'")


def _note_splits(rows: Sequence[Row], source: str) -> None:
    """Note values of the column split that pin to no part of ours, such as the train and test of public data sets."""
    values = Counter(
        str(value) for row in rows for name, value in row.fields.items() if _fold(name) == "split" and value
    )
    if other := {value: n for value, n in values.items() if value not in SPLITS}:
        listed = ", ".join(f"'{value}' ({n})" for value, n in list(other.items())[:5])
        note("prompts", f"{source}: in the column split, {listed} is none of {', '.join(SPLITS)} and pins nothing")
