"""What is imported before a command line is answered: a count of modules, never seconds."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

import obliteratus
from obliteratus.cli.app import app
from obliteratus.cli.commands import COMMANDS

HEAVY = {
    "torch",
    "numpy",
    "transformers",
    "accelerate",
    "peft",
    "bitsandbytes",
    "optuna",
    "sklearn",
    "pandas",
    "matplotlib",
    "huggingface_hub",
    "safetensors",
    "gguf",
}
LOOK = """
import contextlib, io, json, sys
heavy, lines = json.loads(sys.argv[1])
from obliteratus.__main__ import main
found = []
for words in lines:
    out, err = (io.TextIOWrapper(io.BytesIO()) for _ in range(2))
    sys.argv, code = ["obliteratus", *words], 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            code = end.code
    err.seek(0)
    found.append([code, err.read(), sorted({*heavy} & {*sys.modules})])
print(json.dumps(found))
"""
ERRORS = {
    "": "",
    "fly": "No such command 'fly'",
    "rum": "Did you mean 'run'",
    "run": "Missing argument",
    "run m --fast": "No such option",
    "run m --seed a": "Invalid value for '--seed'",
    "run m": "--target is missing",
    "run m --target organism:astronomy": "--control is missing",
    "run m --target nothere.txt --control nothere.txt": "nothere.txt: this prompt file does not exist",
    "run m --target organism:astronmy --control organism:astronmy": "no model organism is called 'astronmy'",
    "run organism:astronmy": "no model organism is called 'astronmy'",
    "run nothere.gguf": "nothere.gguf does not exist",
    "run m --method leas_change": "did you mean 'least_change'?",
    "run m --method nothere.toml": "nothere.toml: this recipe file does not exist",
    "run m --set x": "give path=value",
    "run m --set excise.strength=9": "less than or equal to 4",
    "run m --set excise.strenght=1": "did you mean 'excise.strength'?",
    "run m --behavior refusals": "there is no behavior 'refusals'",
    "run m --column target=": "give one column, or GROUP",
    "run m --split-by word": "give wording or category",
    "run m --save mergd": "did you mean 'merged'?",
    "run m --memory lots": "give a size such as 6GB",
    "run m --dtype float31": "did you mean 'float32'?",
    "run m --quantize 3bit": "did you mean '8bit'?",
    "run m --plugin nothere.py": "nothere.py: this plug-in does not exist",
    "study quick --plugin pyproject.toml": "pyproject.toml: this plug-in does not exist",
    "run m --device gpu": "device 'gpu' does not exist",
    "run m --device tp": "the command line runs one process",
    "run m --out tests": "tests: the output folder is in use",
    "search m": "--target is missing",
    "verify m": "--target is missing",
    "analyze m --out new": "--target is missing",
    "demo --method nothere": "method 'nothere' does not exist",
    "methods nothere": "method 'nothere' does not exist",
    "behaviors nothere": "there is no behavior 'nothere'",
    "inspect /nothere": "/nothere does not exist",
    "apply nothere m --out new": "nothere: there is no plan.safetensors",
    "chat m --plan nothere": "nothere: there is no plan.safetensors",
    "serve m --plan a=nothere": "nothere: there is no plan.safetensors",
    "bench m --plan nothere": "nothere: there is no plan.safetensors",
    "judge nothere": "nothere: there is no answers.jsonl",
    "push nothere a/b": "nothere: there is no run.json",
    "report nothere": "nothere: there is no results.jsonl",
    "reproduce nothere": "nothere: there is no reproduce.json",
    "study": "name a study file or one of",
    "study nothere": "preset 'nothere' does not exist",
}


def look(lines: list[list[str]], heavy: set[str] = HEAVY) -> list[tuple[int, str, list[str]]]:
    """Exit code, stderr and heavy modules imported so far, of each command line in turn in one fresh process."""
    asked = json.dumps([sorted(heavy), lines])
    found = subprocess.run([sys.executable, "-c", LOOK, asked], capture_output=True, text=True, check=True)
    return [(code, err, modules) for code, err, modules in json.loads(found.stdout)]


def test_help_imports_no_library() -> None:
    lines = [["--help"], *([name, "--help"] for name in COMMANDS)]
    for words, (code, _, modules) in zip(lines, look(lines), strict=True):
        assert (code, modules) == (0, []), words


def test_methods_import_no_library() -> None:
    lines = [["methods"], ["methods", "rdo"], ["methods", "--json"]]
    assert [(code, modules) for code, _, modules in look(lines)] == [(0, [])] * 3


def test_usage_errors_import_no_library() -> None:
    for (line, said), (code, err, modules) in zip(ERRORS.items(), look([line.split() for line in ERRORS]), strict=True):
        assert (code, modules) == (2, []), line
        assert said in err, line
        assert not said or err.startswith("error: "), line


def test_what_is_imported_is_seen() -> None:
    """A help page brings rich, so a library that came with it would be seen too."""
    assert look([["run"], ["--help"]], {"rich.markdown"})[0][2] == []
    assert look([["--help"]], {"rich.markdown"})[0][2] == ["rich.markdown"]


def test_a_command_imports_no_other() -> None:
    modules = {f"obliteratus.cli.{module}" for module, _ in COMMANDS.values()}
    assert look([["judge", "--help"]], modules)[0][2] == ["obliteratus.cli.judge"]


def test_a_run_imports_only_what_it_needs() -> None:
    code = "import json, sys; import obliteratus.cli.jobs; print(json.dumps(sorted(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = set(json.loads(found.stdout))
    assert {"torch", "transformers"} <= imported
    assert not {"optuna", "sklearn", "peft", "bitsandbytes", "matplotlib", "pandas"} & imported


def test_importing_the_package_imports_no_library() -> None:
    code = "import json, sys, obliteratus; print(json.dumps([sorted(sys.modules), dir(obliteratus)]))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported, names = json.loads(found.stdout)
    assert not HEAVY & {*imported}
    assert set(obliteratus.__all__) <= {*names}


def typed_names(path: Path) -> dict[str, str]:
    """Name → module of what a module imports for type checkers alone."""
    blocks = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.If)]
    imports: list[Any] = [node for block in blocks for node in block.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: node.module.removeprefix("obliteratus.") for node in imports for alias in node.names}


def test_type_checkers_see_the_names_that_are_there() -> None:
    assert typed_names(Path(obliteratus.__file__)) == obliteratus.MODULES
    assert set(obliteratus.MODULES) == set(obliteratus.__all__)


def test_the_help_shows_every_command_with_its_first_sentence() -> None:
    shown = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "300", "TERMINAL_WIDTH": "300"}).stdout
    for name in COMMANDS:
        page = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "300", "TERMINAL_WIDTH": "300"}).stdout
        row = next(line for line in shown.splitlines() if line.startswith(f"│ {name} "))
        first = row.strip("│ ").removeprefix(name).strip()
        assert first
        assert first in page
