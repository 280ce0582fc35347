"""Imports run one way by package, as docs and DESIGN list them, and a newcomer finds the way around."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from tools.count_imports import count_arrows, imported_by, list_modules

import obliteratus

SRC = Path(obliteratus.__file__).parents[1]
ROOT = SRC / "obliteratus"
# A package may import from the packages of earlier lines only.
ORDER = (
    ("core",),
    ("report", "weights", "judge"),
    ("summon",),
    ("inference",),
    ("prompts", "probe", "distill", "weigh", "excise", "benchmark"),
    ("verify",),
    ("causal",),
    ("tune", "analyze"),
    ("pipeline",),
    ("rebirth", "search", "study"),
    ("forecast", "compare", "share", "audit"),
    ("harden",),
    ("serve",),
    ("cli",),
)
LEVEL = {package: level for level, packages in enumerate(ORDER) for package in packages}
MODULES = list_modules(SRC)
IMPORTS = {name: imported_by(path, MODULES) for name, path in MODULES.items()}
PACKAGES = sorted({path.parent for path in MODULES.values()})
# These hold mathematics on tensors and know no model library.
PURE = ("obliteratus.distill.", "obliteratus.weigh.", "obliteratus.excise.linear")
MODEL_LIBRARIES = {"transformers", "peft", "accelerate", "huggingface_hub", "tokenizers"}
MAX_RUN_LINES = 120  # run.py is to be read at a glance, as DESIGN §5 shows it
MAX_ROOT_FILES = 3


def package_of(module: str) -> str:
    """``excise`` of ``obliteratus.excise.live.hooks``; empty for the front doors."""
    return "" if module in ("obliteratus.__init__", "obliteratus.__main__") else module.split(".")[1]


def misplaced(imports: dict[str, set[str]]) -> list[str]:
    """Imports that run against the order."""
    return [
        f"{name} imports {other}"
        for name, others in imports.items()
        for other in others
        if package_of(name) and package_of(name) != package_of(other)
        if LEVEL[package_of(other)] >= LEVEL[package_of(name)]
    ]


def test_every_package_has_its_place_in_the_order() -> None:
    assert {package_of(name) for name in MODULES} - {""} == set(LEVEL)


def test_imports_run_one_way() -> None:
    assert misplaced(IMPORTS) == []


def test_an_import_against_the_order_is_noticed() -> None:
    assert misplaced({"obliteratus.core.types": {"obliteratus.cli.app"}, "obliteratus.probe.cache": set()})
    assert misplaced({"obliteratus.tune.fit": {"obliteratus.analyze.base"}})  # two packages of one line


def test_no_module_imports_itself_through_others() -> None:
    """A package's own front door may be imported from inside it."""
    finished: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"a circle: {' → '.join((*path, name))}"
        if name not in finished:
            for other in IMPORTS[name]:
                if not (other.endswith("__init__") and package_of(other) == package_of(name)):
                    visit(other, (*path, name))
            finished.add(name)

    for name in MODULES:
        visit(name, ())


def closure(name: str) -> set[str]:
    """A module and all modules of ours that it reaches."""
    seen: set[str] = set()
    todo = [name]
    while todo:
        if (current := todo.pop()) not in seen:
            seen.add(current)
            todo += IMPORTS[current]
    return seen


def libraries_of(name: str) -> set[str]:
    """Top-level names of everything that a module imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith(PURE)])
def test_the_mathematics_imports_no_model_library(name: str) -> None:
    for part in closure(name):
        assert not libraries_of(part) & MODEL_LIBRARIES, f"{name} reaches a model library through {part}"


def test_the_search_for_model_libraries_can_find_one() -> None:
    reached = closure("obliteratus.excise.bake.adapter")
    assert any(libraries_of(part) & MODEL_LIBRARIES for part in reached)


def imported_at_once(text: str, package: str) -> bool:
    """Whether a module imports a package as soon as it is imported itself."""
    found = [node for node in ast.parse(text).body if isinstance(node, ast.ImportFrom)]
    return any((node.module or "").startswith(f"obliteratus.{package}") for node in found)


def test_searches_are_imported_only_where_one_is_made() -> None:
    """Optuna is an extra, and without it everything else works."""
    others = [path for name, path in MODULES.items() if package_of(name) != "search"]
    assert [path for path in others if imported_at_once(path.read_text(), "search")] == []
    assert "obliteratus.search" not in (ROOT / "__init__.py").read_text().partition("register_view_modules(")[2]


def test_an_import_at_once_is_noticed() -> None:
    assert imported_at_once("from obliteratus.search.run import search", "search")
    assert not imported_at_once("def f():\n    from obliteratus.search.run import search", "search")


def test_core_imports_nothing_of_ours() -> None:
    assert all(package_of(o) == "core" for name in MODULES if package_of(name) == "core" for o in IMPORTS[name])


@pytest.mark.parametrize("folder", PACKAGES, ids=lambda folder: str(folder.relative_to(SRC)))
def test_every_package_says_what_lives_there_and_what_it_may_import(folder: Path) -> None:
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
    assert 1 <= len([line for line in text.splitlines() if line]) <= 5
    if folder != ROOT:
        assert "ay import" in text, f"{folder.name}/__init__.py does not say what the package may import"


def test_run_reads_at_a_glance() -> None:
    assert len((ROOT / "pipeline" / "run.py").read_text().splitlines()) <= MAX_RUN_LINES


def test_the_root_of_the_package_is_tidy() -> None:
    files = [path.name for path in ROOT.glob("*.py") if path.name != "__init__.py"]
    assert len(files) <= MAX_ROOT_FILES


def test_arrows_are_counted() -> None:
    """The script that counts the arrows between packages agrees with the imports seen here."""
    arrows = count_arrows(SRC)
    assert ("pipeline", "verify") in arrows
    assert ("verify", "pipeline") not in arrows


def test_the_public_names_are_few_and_there() -> None:
    assert len(obliteratus.__all__) <= 60  # what one finds on a page of docs/guide/api.md
    assert obliteratus.__all__ == sorted(obliteratus.__all__)
    assert all(getattr(obliteratus, name) is not None for name in obliteratus.__all__)


def test_no_public_name_hides_a_package() -> None:
    """``import obliteratus.verify.behavior as b`` works, whatever was imported before."""
    assert not set(obliteratus.__all__) & set(LEVEL)


def test_every_slow_test_is_there() -> None:
    """A test that was renamed would otherwise come back into the inner loop."""
    for name in (Path(__file__).with_name("slow.txt")).read_text().split():
        file, function = name.split("::")[0], name.split("::")[-1]
        path = Path(__file__).parents[1] / file
        assert path.is_file(), name
        assert f"def {function}(" in path.read_text(), name
