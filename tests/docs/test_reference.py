"""The generated reference is up to date and whole, and so are the figures."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tools.draw_architecture import find_levels, read_imports, reduce_imports
from tools.figures import FIGURES, FOLDER
from tools.reference_pages import clean, make_pages, make_recipes_page, read_notes

import obliteratus as ob
from obliteratus.cli.commands import COMMANDS
from obliteratus.core.settings import Excise, Recipe

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "docs/reference"


@pytest.fixture(scope="module")
def made() -> dict[Path, str]:
    return make_pages()


@pytest.mark.parametrize("name", ["commands.md", "recipes.md", "steps.md"])
def test_a_page_is_what_would_be_made_now(name: str, made: dict[Path, str]) -> None:
    assert (REFERENCE / name).read_text() == made[REFERENCE / name], f"{name} is stale: run `make pages`"


def test_every_command_and_key_is_there() -> None:
    commands, recipes = ((REFERENCE / name).read_text() for name in ("commands.md", "recipes.md"))
    assert re.findall(r"^### (\S+)$", commands, re.MULTILINE) == list(COMMANDS)
    for settings in (Recipe, Excise):
        assert all(f"| `{key}` |" in recipes for key in settings.model_fields)
    assert all(read_notes(Excise).values())


def test_a_changed_key_makes_a_page_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    before = make_recipes_page()
    monkeypatch.delitem(Excise.model_fields, "heads")
    assert make_recipes_page() != before


def test_a_cell_holds_any_text() -> None:
    assert clean("a | b\n  <c> ``d``") == "a \\| b &lt;c> `d`"


def test_the_python_reference_has_every_public_name() -> None:
    text = (REFERENCE / "api.rst").read_text()
    assert sorted(re.findall(r"^\.\. (?:auto\w+|data):: (\w+)$", text, re.MULTILINE)) == ob.__all__


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_what_would_be_drawn_now(name: str) -> None:
    assert (FOLDER / f"{name}.svg").read_text() == str(FIGURES[name]()), f"{name}.svg is stale: run `make figures`"


def test_a_package_stands_above_what_it_imports() -> None:
    imports = {"a": {"b", "c"}, "b": {"c"}, "c": set[str]()}
    assert find_levels(imports) == {"a": 2, "b": 1, "c": 0}
    assert reduce_imports(imports) == {"a": {"b"}, "b": {"c"}, "c": set()}
    assert "core" in read_imports(ROOT / "src")["cli"]
