"""The README stays true: its example runs, its commands exist, its tree names files that are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tests.support.tiny import tiny, tiny_tokenizer
from typer.testing import CliRunner

from obliteratus.cli.app import app

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert example is not None
    tiny("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "target.txt").write_text("\n".join(f"Tell me of boat {n}." for n in range(16)))
    (tmp_path / "control.txt").write_text("\n".join(f"What is {n} plus {n}?" for n in range(16)))
    monkeypatch.chdir(tmp_path)
    exec(example[1].replace("HuggingFaceTB/SmolLM2-135M-Instruct", "model"), {})
    assert (tmp_path / "edited" / "run.json").is_file()


def test_commands_and_options_exist() -> None:
    lines = [line for line in re.findall(r"obliteratus ([a-z]+[^`\n]*)", README) if not line.startswith("as ")]
    assert len(lines) >= 7
    for line in lines:
        name, options = line.split()[0], re.findall(r"--[a-z-]+", line)
        shown = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200"})
        assert shown.exit_code == 0, name
        assert all(option in shown.stdout for option in options), line


def test_the_tree_names_what_is_there() -> None:
    tree = re.search(r"## The tree\n```\n(.*?)```", README, re.DOTALL)
    assert tree is not None
    for name in re.findall(r"([a-z_]+\.py)", tree[1]):
        assert (ROOT / "src/obliteratus" / name).is_file(), name
    for folder in re.findall(r"^(?:[├└]── )?([a-z]+)/", tree[1], re.MULTILINE):
        assert (ROOT / folder).is_dir() or (ROOT / "src/obliteratus" / folder).is_dir(), folder


def test_no_placeholder_is_left() -> None:
    assert not re.search(r"[A-Z]+_TABLE", README)
