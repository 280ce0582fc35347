"""Behavior tables become compiled patterns, and whatever is wrong with one is told in one line."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import regex

from obliteratus.core.errors import UserError
from obliteratus.judge.language import list_languages
from obliteratus.judge.phrases import LISTS, NEVER, Compile, Matcher, Phrases
from obliteratus.judge.time_limit import compile_with_limit

# Short folded answers without a letter in common, by script: what finds a match in all of them matches everything.
ORDINARY = (
    ("paris", "50 km", "okay", "le jour", "sun"),
    ("да", "поезд", "нет", "окно"),
    ("好", "巴黎", "太阳"),
    ("はい", "パリ", "空"),
    ("네", "파리", "집"),
    ("نعم", "بيت", "شمس"),
    ("हाँ", "घर", "दिन"),
)


BACK_REFERENCE = re.compile(r"(?<!\\)(?:\\\\)*\\[1-9]")


def choose_compiler(where: str, own: bool) -> Compile:
    """Return what compiles patterns: users' patterns are limited in time, the built-in ones are known to be quick."""
    return partial(compile_with_limit, where=where) if own else re.compile


def compile_more(where: str, code: str, part: Any, known: Mapping[str, Any]) -> Phrases:
    """Return further phrases of a language. They may use the fragments of those that are known. Raises UserError."""
    fragments = {name: text for name, text in known.items() if isinstance(text, str)}
    if isinstance(part, dict) and (both := fragments.keys() & part.keys() - {"letters"}):
        raise UserError(f"{where}: [{code}] {min(both)} is a fragment of the behavior already; give another name")
    _check_language(where, code, part)
    fragments.pop("lead", None)
    return compile_language(where, code, fragments | part, choose_compiler(where, own=True))


def compile_language(where: str, code: str, part: Any, to_matcher: Compile) -> Phrases:
    """Return one language's phrases, all compiled. Raises UserError that names the language and what is wrong."""
    _check_language(where, code, part)
    phrases = Phrases(code, part, to_matcher)
    try:
        matchers = {name: getattr(phrases, name) for name in (*LISTS, "letters")}
    except (re.error, regex.error) as error:
        raise UserError(f"{where}: [{code}] has an invalid pattern: {error}; see Python's `re`") from error
    except ValueError as error:
        raise UserError(f"{where}: [{code}] {error}; write out what it stands for") from error
    except KeyError as error:
        raise UserError(f"{where}: [{code}] names <{error.args[0]}>, which is not there; add it as a string") from error
    for name in LISTS:
        if _matches_everything(matchers[name]):
            raise UserError(f"{where}: [{code}] {name} matches every answer; make its patterns ask for a word")
    return phrases


def _matches_everything(matcher: Matcher) -> bool:
    """Return whether a pattern matches an empty answer, or whatever is written in one script."""
    return bool(matcher.search("")) or any(all(matcher.search(text) for text in texts) for texts in ORDINARY)


def _check_language(where: str, code: str, part: Any) -> None:
    if not re.fullmatch(r"[a-z]{2,3}", code) or code not in list_languages():
        raise UserError(f"{where}: [{code}] is no language that is known; name tables by ISO code, such as [en]")
    if not isinstance(part, dict) or not any(part.get(name) for name in LISTS):
        raise UserError(f"{where}: [{code}] needs lists of patterns: one or more of {', '.join(LISTS)}")
    for name, value in part.items():
        if not isinstance(value, list if name in LISTS else str) or not all(isinstance(text, str) for text in value):
            kind = "a list of strings" if name in LISTS else f"a string; the lists are {', '.join(LISTS)}"
            raise UserError(f"{where}: [{code}] {name} must be {kind}")
        if any(BACK_REFERENCE.search(text) for text in ([value] if isinstance(value, str) else value)):
            raise UserError(f"{where}: [{code}] {name} refers to a group by number, but patterns are joined; name it")


def compile_written(where: str, patterns: Sequence[str], to_matcher: Compile) -> Matcher:
    """Return the patterns on an answer as it is written, as one. Raises UserError for an invalid one."""
    if not patterns:
        return NEVER
    try:
        matcher = to_matcher("(?m)" + "|".join(f"(?:{pattern})" for pattern in patterns))
    except (re.error, regex.error) as error:
        raise UserError(f"{where}: written has an invalid pattern: {error}; see Python's `re`") from error
    if _matches_everything(matcher):
        raise UserError(f"{where}: written matches every answer; make its patterns ask for a sign")
    return matcher
