"""Limits that keep the code readable: measured, so that they hold."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import obliteratus

ROOT = Path(obliteratus.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
FILE_LINES, FUNCTION_LINES = 400, 40
COMMAND_LINES = 52  # a command has a line for each of its options
LONGER = {
    "summon/architectures.py": 600,
    "core/types.py": 570,
    "core/settings.py": 425,
}  # a table; nouns, half of it docstrings
REPOSITORY = ROOT.parents[1]
# What is written for readers: code and documents. Prompts and words of the organisms are data.
WRITTEN = sorted(
    path
    for pattern in ("src/**/*.py", "src/**/*.toml", "bench/*.py", "tests/**/*.py", "docs/**/*.md", "*.md", "*.toml")
    for path in REPOSITORY.glob(pattern)
    if path != Path(__file__)
)
BRITISH = re.compile(
    r"behaviour|colour|favour|neighbour|honour|centre|licence|labelled|modelled|cancelled|learnt|whilst|artefact"
    r"|analys(?=e\b|ed\b|ing\b)|optimis(?!t|m)|(?:quant|normal|minim|maxim|winsor|token|recogn|initial|summar|general"
    r"|serial|material|factor|vector|regular|parametr|penal|random|standard|synchron|util|visual)is(?=e|ing|ation)",
    re.IGNORECASE,
)


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))


def count_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return the lines of a function's signature and code, without its docstring."""
    first = function.body[0]
    described = ast.get_docstring(function) is not None
    docstring = (first.end_lineno or 0) - first.lineno + 1 if described else 0
    return (function.end_lineno or 0) - function.lineno + 1 - docstring


def calls(tree: ast.AST, name: str) -> list[ast.Call]:
    found = [n for n in ast.walk(tree) if isinstance(n, ast.Call)]
    return [c for c in found if isinstance(c.func, ast.Name) and c.func.id == name]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_holds_to_the_limits(path: Path) -> None:
    text, name = path.read_text(encoding="utf-8"), str(path.relative_to(ROOT))
    tree, most = ast.parse(text), COMMAND_LINES if name.startswith("cli/") else FUNCTION_LINES
    assert len(text.splitlines()) <= LONGER.get(name, FILE_LINES)
    for f in functions(tree):
        assert count_lines(f) <= most, f"{name}:{f.lineno} {f.name} is too long"
    assert not calls(tree, "print")
    assert not [c.lineno for c in calls(tree, "getattr") if len(c.args) == 3]  # guesses what a thing is


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_public_things_are_described(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    described = (ast.FunctionDef, ast.ClassDef)
    if path.name != "__init__.py" or tree.body:
        assert ast.get_docstring(tree), "a module says in one line what it is for"
    for node in tree.body:
        if isinstance(node, described) and not node.name.startswith("_"):
            short = isinstance(node, ast.FunctionDef) and len(node.body) <= 2
            assert short or ast.get_docstring(node), f"{node.name} has no docstring"


@pytest.mark.parametrize("path", WRITTEN, ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_spelling_is_american(path: Path) -> None:
    lines = enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
    assert [f"{number}: {line.strip()}" for number, line in lines if find_british(line)] == []


AMERICAN = {
    "our": "or",
    "centre": "center",
    "lled": "led",
    "licence": "license",
    "learnt": "learned",
    "whilst": "while",
    "artefact": "artifact",
    "analys": "analyz",
}


def to_american(word: str) -> str:
    """Return the US spelling of what `BRITISH` matches."""
    for british, american in AMERICAN.items():
        word = word.replace(british, american)
    return re.sub(r"is$", "iz", word)


def find_british(line: str) -> list[str]:
    """Return the British spellings of a line, but for lines that name the new word for an old key.

    These lines have both spellings, or say 'renamed'.
    """
    words = [match[0].lower() for match in BRITISH.finditer(line)]
    return [] if "renamed" in line.lower() else [word for word in words if to_american(word) not in line.lower()]


def test_the_limits_can_be_broken() -> None:
    tree = ast.parse("def f(x):\n    print(x)\n    return getattr(x, 'a', None)\n")
    assert calls(tree, "print")
    assert len(calls(tree, "getattr")[0].args) == 3
    assert count_lines(next(functions(tree))) == 3
    assert count_lines(next(functions(ast.parse('def f(x):\n    """Two\n    lines."""\n    return x')))) == 2


def test_british_spellings_are_found() -> None:
    assert find_british("Normalise the colours of this behaviour") == ["normalis", "colour", "behaviour"]
    assert find_british("a labelled axis, centred, that was learnt") == ["labelled", "centre", "learnt"]
    assert not find_british("'minimise' is now called 'minimize'")
    assert not find_british("an optimistic analysis of quantized weights; analyses promise compromise")
