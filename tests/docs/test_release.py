"""What a release checks: the changelog, and what is in the wheel."""

from __future__ import annotations

import zipfile
from datetime import date
from pathlib import Path

import pytest
from tools.release import NEEDED, ROOT, close_section, find_missing, read_torch, read_version

CHANGES = "# Changelog\n\n## Unreleased\n\n### New\n- More.\n\n## 0.1.0 (2026-01-01)\n- First.\n"
TEMPLATES = ("obliteratus/page.html.j2", "obliteratus/style.css", "obliteratus/answers.js")


def write_wheel(path: Path, names: tuple[str, ...]) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name in names:
            file.writestr(name, "")
    return path


def test_the_open_section_becomes_that_of_the_version() -> None:
    closed = close_section(CHANGES, "0.2.0", date(2026, 2, 3))
    assert "## Unreleased\n\n## 0.2.0 (2026-02-03)\n\n### New\n- More." in closed


@pytest.mark.parametrize(
    ("changes", "version", "said"),
    [
        (CHANGES.replace("### New\n- More.\n\n", ""), "0.2.0", "nothing stands below"),
        (CHANGES, "0.1.0", "not in CHANGELOG.md yet"),
        (CHANGES, "next", "MAJOR.MINOR.PATCH"),
    ],
)
def test_a_release_of_nothing_or_under_a_taken_name_is_refused(changes: str, version: str, said: str) -> None:
    with pytest.raises(SystemExit, match=said):
        close_section(changes, version, date(2026, 2, 3))


def test_what_a_wheel_lacks_or_has_beyond_is_named(tmp_path: Path) -> None:
    whole = write_wheel(tmp_path / "whole.whl", (*NEEDED, *TEMPLATES))
    assert find_missing(whole) == []
    less = write_wheel(tmp_path / "less.whl", (*NEEDED[1:], *TEMPLATES[1:], "tests/test_x.py"))
    assert find_missing(less) == [NEEDED[0], "*.html.j2", "not tests/test_x.py"]


def test_the_project_says_its_version_and_torch() -> None:
    assert read_version()
    assert read_torch().startswith("torch==")
    assert (ROOT / "CHANGELOG.md").read_text().startswith("# Changelog\n")
