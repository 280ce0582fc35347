"""Limits that keep the code readable: measured, so that they hold."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import obliteratus

ROOT = Path(obliteratus.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
FILE_LINES, FUNCTION_LINES = 250, 40
LONGER = {"summon/families.py": 600, "types.py": 350}  # a table of architectures; nouns, half of it docstrings


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))


def calls(tree: ast.AST, name: str) -> list[ast.Call]:
    found = [n for n in ast.walk(tree) if isinstance(n, ast.Call)]
    return [c for c in found if isinstance(c.func, ast.Name) and c.func.id == name]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_holds_to_the_limits(path: Path) -> None:
    text, name = path.read_text(), str(path.relative_to(ROOT))
    tree = ast.parse(text)
    assert len(text.splitlines()) <= LONGER.get(name, FILE_LINES)
    for f in functions(tree):
        assert (f.end_lineno or 0) - f.lineno < FUNCTION_LINES, f"{name}:{f.lineno} {f.name} is too long"
    assert not calls(tree, "print")
    assert not [c.lineno for c in calls(tree, "getattr") if len(c.args) == 3]  # guesses what a thing is


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_public_things_are_described(path: Path) -> None:
    tree = ast.parse(path.read_text())
    described = (ast.FunctionDef, ast.ClassDef)
    if path.name != "__init__.py" or tree.body:
        assert ast.get_docstring(tree), "a module says in one line what it is for"
    for node in tree.body:
        if isinstance(node, described) and not node.name.startswith("_"):
            short = isinstance(node, ast.FunctionDef) and len(node.body) <= 2
            assert short or ast.get_docstring(node), f"{node.name} has no docstring"


def test_the_limits_can_be_broken() -> None:
    tree = ast.parse("def f(x):\n    print(x)\n    return getattr(x, 'a', None)\n")
    assert calls(tree, "print")
    assert len(calls(tree, "getattr")[0].args) == 3
    assert next(functions(tree)).end_lineno == 3
