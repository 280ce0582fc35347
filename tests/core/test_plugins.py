"""Plug-ins: files and packages that register steps, and one line for what is wrong with them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.registries import forget_steps

import obliteratus as ob
from obliteratus.core import plugins
from obliteratus.core.plugins import describe_plugins, list_plugin_files

ROOT = Path(__file__).parents[2]
TEMPLATE = ROOT / "docs/plugin-template"
STEP = '''
import obliteratus as ob


@ob.weighers.register("every_other")
def every_other(directions, sites, acts, *, first: int = {first}):
    """Select every other block."""
'''


@pytest.fixture(autouse=True)
def _forget_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    forget_steps(monkeypatch)


def test_a_file_registers_steps(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(STEP.format(first=0))
    with pytest.raises(ob.UserError, match=r"'every_other' does not exist; .*your own comes with --plugin FILE\.py"):
        ob.weighers["every_other"]
    assert ob.load_plugin(file) == ("weigh step 'every_other'",)
    assert ob.weighers.check("every_other", {}) == {"first": 0}
    assert ob.weighers["every_other"].about == "Select every other block."
    assert ob.load_plugin(str(file)) == ()  # it has not changed
    file.write_text(STEP.format(first=1))
    assert ob.load_plugin(file) == ("weigh step 'every_other'",)  # it has
    assert ob.weighers.check("every_other", {}) == {"first": 1}
    assert list_plugin_files() == (str(file),)
    assert dict(describe_plugins())["plug-in mine.py"].startswith("sha256 ")


def test_two_steps_of_one_name_are_refused(tmp_path: Path) -> None:
    for name in ("mine", "other"):
        (tmp_path / f"{name}.py").write_text(STEP.format(first=0))
    ob.load_plugin(tmp_path / "mine.py")
    with pytest.raises(ob.UserError, match=r"other\.py:5: the plug-in fails \(ValueError: .* registered twice"):
        ob.load_plugin(tmp_path / "other.py")
    (tmp_path / "third.py").write_text(STEP.replace("every_other", "knee").format(first=0))
    with pytest.raises(ob.UserError, match="'knee' is registered twice"):
        ob.load_plugin(tmp_path / "third.py")


BAD = {
    "no Python": ("def f(:", r"mine\.py:1: the plug-in fails \(SyntaxError: "),
    "an error of its own": ("import math\n\nmath.sqrt(-1)", r"mine\.py:3: the plug-in fails \(ValueError: "),
    "a missing library": ("import no_such_library", r"mine\.py:1: the plug-in fails \(ModuleNotFoundError: "),
    "no step": ("x = 1", "registers no step; put @ob.extractors.register"),
    "an error that we explain": ("import obliteratus as ob\nob.load_recipe('basik')", "did you mean 'basic'"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_wrong_with_a_file(kind: str, tmp_path: Path) -> None:
    text, message = BAD[kind]
    (tmp_path / "mine.py").write_text(text)
    for _ in range(2):  # a file that failed is not taken for one that was loaded
        with pytest.raises(ob.UserError, match=message):
            ob.load_plugin(tmp_path / "mine.py")


@pytest.mark.parametrize("name", ["nothere.py", "mine.txt", "."])
def test_what_is_no_file_of_python(name: str, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(ob.UserError, match="this plug-in does not exist; give a Python file"):
        ob.load_plugin(tmp_path / name)


# ------------------------------------------------------------------------------------------- packages
LOOK = """
import json, obliteratus as ob
from obliteratus.core.plugins import describe_plugins
try:
    print(json.dumps([list(ob.weighers), dict(describe_plugins())]))
except ob.UserError as error:
    print(json.dumps(str(error)))
"""


def look(folder: Path) -> object:
    """What a fresh process finds with a folder of packages on its path."""
    path = os.pathsep.join([str(folder), *sys.path])
    environment = os.environ | {"PYTHONPATH": path}
    found = subprocess.run([sys.executable, "-c", LOOK], env=environment, capture_output=True, text=True, check=True)
    return json.loads(found.stdout)


def install(folder: Path, module: str, text: str) -> None:
    """Install a package as pip does, with the entry point that the template names."""
    (folder / f"{module}.py").write_text(text)
    info = folder / f"{module}-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(f"[{plugins.GROUP}]\n{module} = {module}\n")


def test_a_package_registers_its_steps(tmp_path: Path) -> None:
    install(tmp_path, "my_weighers", STEP.format(first=0))
    names, versions = look(tmp_path)  # type: ignore[misc]
    assert "every_other" in names
    assert "knee" in names
    assert versions == {"plug-in my_weighers": "1.2"}


def test_a_package_that_cannot_be_imported_is_named(tmp_path: Path) -> None:
    install(tmp_path, "my_weighers", "import no_such_library")
    assert str(look(tmp_path)).startswith(
        "the plug-in 'my_weighers' of the package my_weighers cannot be imported (ModuleNotFoundError: "
    )


def test_the_template_is_such_a_package(tmp_path: Path) -> None:
    """Its tests pass, and its entry point is in our group."""
    assert f'[project.entry-points."{plugins.GROUP}"]' in (TEMPLATE / "pyproject.toml").read_text()
    path = os.pathsep.join([str(TEMPLATE / "src"), *sys.path])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TEMPLATE / "tests")]
    options = ["-c", os.devnull, "--rootdir", str(tmp_path)]
    done = subprocess.run(
        [*command, *options], env=os.environ | {"PYTHONPATH": path}, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
