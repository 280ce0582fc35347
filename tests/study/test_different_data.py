"""Studies of different texts are not compared without a word."""

from __future__ import annotations

from pathlib import Path

import pytest

from obliteratus.core.toml import dump_toml
from obliteratus.study.files import load_study
from obliteratus.study.output import SETTINGS, describe_different_data


@pytest.mark.parametrize(
    ("changes", "differing"),
    [
        ({}, ""),
        ({"name": "other", "dtype": "bfloat16"}, ""),
        ({"data.samples": 3}, "samples"),
        ({"data.length": 64, "seed": 1}, "length, seed"),
        ({"judge.behavior": "apology"}, "judge"),
    ],
)
def test_what_differs_is_named(changes: dict[str, object], differing: str, tmp_path: Path) -> None:
    folders = {"one": tmp_path / "one", "two": tmp_path / "two"}
    for name, values in (("one", {}), ("two", changes)):
        folders[name].mkdir()
        study = load_study("quick", {"model": "m", **values})
        (folders[name] / SETTINGS).write_text(dump_toml(study), encoding="utf-8")
    said = describe_different_data(folders)
    assert bool(said) == bool(differing)
    assert said == (
        f"The studies differ in {differing}: their changes are of different texts, prompts or verdicts." if said else ""
    )
