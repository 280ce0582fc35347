"""The doctor tells what is here and what is missing, from what the installed package itself asks for."""

from __future__ import annotations

import json
from importlib.metadata import metadata
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from obliteratus.cli import diagnosis
from obliteratus.cli.app import app
from obliteratus.cli.diagnosis import EXTRAS, check_requirements, find_base, look_at_cache
from obliteratus.weights.organism_files import BASE_FOLDERS

LINES = ["rich>=1", "rich>=999", "not-a-package>=2", "numpy>=2; extra == 'some'", "no-such-thing; extra == 'more'"]


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["doctor", *arguments])


def test_requirements_are_compared_with_what_is_installed() -> None:
    fits, old, missing = check_requirements(LINES)
    assert fits.fits
    assert (old.fits, bool(old.installed)) == (False, True)
    assert (missing.fits, missing.installed, missing.wanted) == (False, "", ">=2")


def test_an_extra_has_packages_of_its_own() -> None:
    assert [(one.name, one.fits) for one in check_requirements(LINES, "some")] == [("numpy", True)]
    assert [(one.name, one.fits) for one in check_requirements(LINES, "more")] == [("no-such-thing", False)]
    assert check_requirements(LINES, "another") == []


def test_every_extra_says_what_it_is_for() -> None:
    assert {*EXTRAS, "dev"} == {*(metadata("obliteratus").get_all("Provides-Extra") or [])}


def test_a_whole_installation_has_no_problem() -> None:
    result = call("--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["problems"] == []
    assert {"torch", "transformers"} <= {one["name"] for one in found["packages"] if one["fits"]}
    assert found["devices"]["cpu"]
    assert 0 < found["memory"]["available"] <= found["memory"]["total"]


def test_what_is_missing_is_named_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "requires", lambda name: [*LINES, "no-such-thing>=3; extra == 'parquet'"])
    result = call()
    assert result.exit_code == 2
    said = " ".join(result.stdout.split())
    assert "not-a-package is missing; pip install 'not-a-package>=2'" in said
    assert "is installed, and >=999 is needed" in said
    assert "Parquet prompt files no-such-thing" in said
    assert "Well" not in said
    assert all(len(line) <= 80 for line in result.stdout.splitlines())


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OBLITERATUS_CACHE", str(tmp_path / "file" / "cache"))
    result = call()
    assert result.exit_code == 2
    assert "set OBLITERATUS_CACHE to another folder" in " ".join(result.stdout.split())


def test_the_cache_is_measured(tmp_path: Path) -> None:
    (tmp_path / "probes").mkdir()
    (tmp_path / "probes" / "one").write_bytes(b"x" * 1000)
    found = look_at_cache(tmp_path)
    assert (found["bytes"], found["writable"]) == (1000, True)
    assert look_at_cache(tmp_path / "not" / "yet")["bytes"] == 0


def test_the_base_model_is_found_in_the_cache(tmp_path: Path) -> None:
    assert find_base(tmp_path) != "cache"
    (tmp_path / BASE_FOLDERS[1]).mkdir()
    assert find_base(tmp_path) == "cache"
