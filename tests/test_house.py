"""Imports run one way, and the mathematics knows nothing of model libraries."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import obliteratus

ROOT = Path(obliteratus.__file__).parent
# A module may import from its own level's package and from levels before it. Longest prefix wins.
# Recipes are checked against the registries of distill, weigh and verify, so `recipe` stands above these.
LEVELS = [
    ["types", "settings", "results", "errors", "shapes", "sketch", "progress", "work"],
    ["registry"],
    ["prompts", "summon", "excise.linear"],
    ["probe", "distill", "weigh", "excise", "verify"],
    ["tune"],
    ["analyze"],
    ["recipe", "coverage", "store", "kept_probes"],
    ["card", "record", "rules", "advise", "ondisk"],
    ["pipeline", "search", "study", "analyze.report", "rebirth", "report"],
    ["jobs", "terminal", "forecast", "costs"],
    ["options", "planner"],
    ["cli", "cli_analyze", "cli_inspect", "cli_study", "ui", "__main__"],
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
PURE = ["distill", "weigh", "excise.linear"]
LIBRARIES = {"transformers", "peft", "accelerate", "huggingface_hub", "tokenizers"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(p): p for p in sorted(ROOT.rglob("*.py"))}
INNER = [name for name in MODULES if name]  # all but the package's front door, which opens everything


def imported(path: Path) -> set[str]:
    """Absolute names of everything that a file imports, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def ours(path: Path) -> set[str]:
    names = {n.removeprefix("obliteratus.") for n in imported(path) if n.startswith("obliteratus.")}
    return {n for n in names if n in MODULES}


def key_of(name: str) -> str:
    parts = name.split(".")
    return next((k for i in range(len(parts), 0, -1) if (k := ".".join(parts[:i])) in LEVEL), "")


@pytest.mark.parametrize("name", INNER)
def test_every_module_has_a_level(name: str) -> None:
    assert key_of(name), f"{name} is in no level of tests/test_imports.py; put it where it belongs"


@pytest.mark.parametrize("name", INNER)
def test_imports_run_one_way(name: str) -> None:
    mine = key_of(name)
    for other in ours(MODULES[name]):
        theirs = key_of(other)
        own = theirs == mine or ((theirs, mine) == ("excise", "excise.linear") and other == "excise")
        assert own or LEVEL[theirs] < LEVEL[mine] or same_level_is_fine(mine, theirs), f"{name} imports {other}"


def same_level_is_fine(mine: str, theirs: str) -> bool:
    """Modules of one level may use each other; `test_there_are_no_circles` holds them to one way."""
    return LEVEL[mine] == LEVEL[theirs]


def test_there_are_no_circles() -> None:
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"a circle: {' → '.join((*path, name))}"
        if name not in done:
            for other in ours(MODULES[name]) - {name, "excise", "summon", "distill", "verify"}:
                visit(other, (*path, name))
            done.add(name)

    for name in INNER:
        visit(name, ())


def closure(name: str) -> set[str]:
    seen: set[str] = set()
    todo = [name]
    while todo:
        if (current := todo.pop()) not in seen:
            seen.add(current)
            todo += ours(MODULES[current])
    return seen


@pytest.mark.parametrize("name", [n for n in INNER if any(n == p or n.startswith(p + ".") for p in PURE)])
def test_the_mathematics_imports_no_model_library(name: str) -> None:
    for part in closure(name):
        used = {n.partition(".")[0] for n in imported(MODULES[part])} & LIBRARIES
        assert not used, f"{name} reaches {used} through {part}"


def test_the_search_for_libraries_can_fail() -> None:
    assert any("transformers" in {n.partition(".")[0] for n in imported(MODULES[m])} for m in closure("excise.lora"))


def test_types_import_nothing_of_ours_but_shapes_and_what_stands_for_rows() -> None:
    assert ours(MODULES["types"]) == {"shapes", "sketch"}
    assert ours(MODULES["sketch"]) == {"shapes"}


def test_the_public_names_are_few_and_there() -> None:
    assert len(obliteratus.__all__) <= 20
    assert obliteratus.__all__ == sorted(obliteratus.__all__)
    assert all(vars(obliteratus)[name] is not None for name in obliteratus.__all__)
