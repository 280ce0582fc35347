"""The README and the pages stay true: examples run, commands and options exist, links and the tree name real files."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
from tests.support.refuser import asked, refuser
from tests.support.registries import forget_steps
from tests.support.variants import vary
from typer.testing import CliRunner

import obliteratus as ob
from obliteratus.cli.app import app
from obliteratus.cli.commands import COMMANDS
from obliteratus.judge.behavior import load_behavior
from obliteratus.pipeline.recipe import load_recipe
from obliteratus.pipeline.values import validate_recipe
from obliteratus.study.settings import Study

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src/obliteratus"
README = ROOT / "README.md"
PAGES = sorted([README, ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
GUIDES = [README, *sorted((ROOT / "docs/guide").glob("*.md")), *sorted((ROOT / "docs/questions").glob("*.md"))]
COMPARED = ROOT / "docs/guide/comparison.md"
MOST_LINES = 140  # of the README: what one reads before one decides
TARGETS = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def page_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


def find_blocks(page: Path, language: str) -> list[str]:
    """Return the fenced blocks of a page in the given language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def find_commands(page: Path) -> list[str]:
    """Return what a page tells the reader to type: lines of sh blocks, and inline code that begins with a program."""
    lines = [line for block in find_blocks(page, "sh") for line in block.splitlines()]
    lines += re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8"))
    commands = [line.split(" #")[0].strip().removeprefix(".venv/bin/") for line in lines]
    return [line for line in commands if line.startswith(("obliteratus ", "python -m ", "make "))]


def explain_error(command: str) -> str:
    """Return why a command of a page does not work, or '' if its names and options exist."""
    program, *words = shlex.split(command.replace("[NAME]", "NAME").replace("…", ""))
    if program == "make":
        goals = {word for word in words if "=" not in word}  # the rest are values of variables
        return "" if goals and goals <= TARGETS else f"no target of the Makefile: {command}"
    if program == "python":
        return "" if find_spec(words[1]) else f"no such module: {command}"
    shown = CliRunner().invoke(app, [words[0], "--help"], env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"})
    if shown.exit_code:
        return f"no such command: {command}"
    unknown = {word for word in words if word.startswith("--")} - set(re.findall(r"--[a-z-]+", shown.stdout))
    return f"unknown {', '.join(sorted(unknown))}: {command}" if unknown else ""


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in GUIDES if find_blocks(page, "python")], ids=page_id)
def test_python_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = refuser(word="I cannot help with that.")
    subject.model.save_pretrained(tmp_path / "model")
    subject.tokenizer.save_pretrained(tmp_path / "model")
    for group, prompts in vary(asked(), 3).groups.items():
        (tmp_path / f"{group}.txt").write_text("\n".join(prompt.text for prompt in prompts))
    monkeypatch.chdir(tmp_path)
    forget_steps(monkeypatch)
    names: dict[str, object] = {}  # later examples of a page go on from the earlier ones
    for example in find_blocks(page, "python"):
        exec(example.replace("HuggingFaceTB/SmolLM2-135M-Instruct", "model"), names)
    assert (tmp_path / "edited" / "run.json").is_file() == ("ob.save(" in page.read_text())


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_commands_and_options_exist(page: Path) -> None:
    errors = [error for command in find_commands(page) if (error := explain_error(command))]
    assert not errors


def test_a_page_shows_what_every_command_is_for() -> None:
    page = ROOT / "docs/guide/commands.md"
    shown = {command.split()[1] for command in find_commands(page) if command.startswith("obliteratus ")}
    assert shown == set(COMMANDS)


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= MOST_LINES
    assert len(find_blocks(README, "python")[0].splitlines()) <= 10


def read_figures(page: Path) -> dict[str, list[str]]:
    """Return the three figures of each method in the table of methods: topic refused, others refused, KL."""
    table = page.read_text().partition("| method | what it edits |")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    return {re.findall("`([a-z_]+)`", row[0])[0]: row[2:5] for row in rows}


def test_the_readme_and_the_guide_have_the_same_figures() -> None:
    short, whole = read_figures(README), read_figures(COMPARED)
    assert {name: figures for name, figures in short.items() if name != "calibrated"}.items() <= whole.items()
    assert {*whole} - {*short} == {"failspy"}  # stands beside rdo
    assert len(whole) >= 19


def test_the_page_on_speed_has_the_forecasts() -> None:
    table, page = ((ROOT / name).read_text() for name in ("docs/runtimes.md", "docs/questions/speed.md"))
    units = {" min": " minutes", " s": " seconds"}
    for method in ("balanced", "basic"):
        number, unit = re.findall(rf"^\| {method} \| ([\d.]+)( min| s) ", table, re.MULTILINE)[0]
        assert f"{number}{units[unit]}" in " ".join(page.split()), f"{method} is forecast at {number}{unit}"


def test_the_figures_of_the_demo_are_those_of_its_picture() -> None:
    rates = json.loads((ROOT / "docs/figures/demo.json").read_text())["refusal"]
    page = (ROOT / "docs/guide/first-steps.md").read_text()
    for group, name in (("target", "refuses the topic"), ("control", "refuses other prompts")):
        row = next(line for line in page.splitlines() if line.startswith(f"| {name} |"))
        for when in ("before", "after"):
            value, low, high = (f"{100 * rates[group][when][key]:.1f}" for key in ("value", "low", "high"))
            assert re.search(rf"{value} %\*?\*? \({low}–{high}\)", row), (row, value, low, high)


@pytest.mark.parametrize(
    "command", ["obliteratus fly MODEL", "obliteratus run MODEL --fast", "python -m bench.no", "make x"]
)
def test_a_command_that_does_not_exist_is_noticed(command: str) -> None:
    assert explain_error(command)


def test_overrides_in_the_guides_are_valid() -> None:
    """A path after --set that belongs to a recipe is one that its settings have."""
    from obliteratus.core.toml import parse_overrides

    pairs = [pair for page in GUIDES for pair in re.findall(r"--set '?((?:excise|probe)\.[^\s`']+)", page.read_text())]
    assert len(pairs) >= 3
    for pair in pairs:
        load_recipe("basic", parse_overrides([pair]))


@pytest.mark.parametrize("page", [page for page in GUIDES if find_blocks(page, "toml")], ids=page_id)
def test_files_in_the_guides_are_valid(page: Path, tmp_path: Path) -> None:
    """Studies, recipes, and behaviors: they alone have phrases of English."""
    for block in find_blocks(page, "toml"):
        if "en" in tomllib.loads(block):
            (tmp_path / "own.toml").write_text(block)
            load_behavior(str(tmp_path / "own.toml"))
        elif "distill" in tomllib.loads(block):
            validate_recipe(tomllib.loads(block), "example")  # its steps may come from a plug-in
        else:
            Study.model_validate(tomllib.loads(block) | {"name": "example"})


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", [*GUIDES, ROOT / "CONTRIBUTING.md"], ids=page_id)
def test_files_that_a_page_names_exist(page: Path) -> None:
    """Inline code such as `verify/refusal.py` or `distill/` names a file or folder of the package or repository."""
    names = re.findall(r"`([a-z_]+/(?:[a-z_]+/)*(?:[a-z_]+\.(?:py|toml|md))?)`", page.read_text(encoding="utf-8"))
    assert [name for name in names if not ((PACKAGE / name).exists() or (ROOT / name).exists())] == []


def test_the_tree_names_every_package() -> None:
    page = (ROOT / "docs/guide/architecture.md").read_text()
    tree = re.search(r"## The tree\n```\n(.*?)```", page, re.DOTALL)
    assert tree is not None
    inner = re.findall(r"^[├└]── ([a-z_]+)(/|\.py)", tree[1], re.MULTILINE)
    there = {path.name for path in PACKAGE.iterdir() if path.is_dir() and (path / "__init__.py").is_file()}
    assert {name for name, kind in inner if kind == "/"} == there
    assert all((PACKAGE / f"{name}.py").is_file() for name, kind in inner if kind == ".py")
    assert all((ROOT / name).is_dir() for name in re.findall(r"^([a-z]+)/  ", tree[1], re.MULTILINE))


def test_experiments_are_indexed() -> None:
    folder = ROOT / "docs/experiments"
    index = (folder / "README.md").read_text()
    files = {path.name for path in folder.glob("*.md")} - {"README.md"}
    assert set(re.findall(r"^\| \[([a-z-]+\.md)\]", index, re.MULTILINE)) == files


def test_references_to_experiments_exist() -> None:
    """Comments name a file of experiments, and optionally a title or words in it: docs/experiments/x.md, "Title"."""
    for path in [*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.toml")]:
        text = re.sub(r"\s*\n\s*(?:# )?", " ", path.read_text())
        for name, title in re.findall(r'(docs/experiments/[a-z-]+\.md)(?:, "([^"]+)")?', text):
            assert (ROOT / name).is_file(), f"{path}: {name}"
            assert title in (ROOT / name).read_text(), f"{path}: {name} has no '{title}'"


def test_no_placeholder_is_left() -> None:
    assert not [page for page in PAGES if re.search(r"[A-Z]+_TABLE|\{\{", page.read_text())]


def test_the_guide_has_every_public_name() -> None:
    text = (ROOT / "docs/guide/api.md").read_text()
    assert [name for name in ob.__all__ if not re.search(rf"(?<![a-z_]){name}(?![a-z_])", text)] == []
