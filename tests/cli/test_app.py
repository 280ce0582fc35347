"""The command line as a user meets it: every bad input gets one line and exit 2, and nothing is written."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.support.command_line import call, one_line
from tests.support.tiny import save_tiny, tiny, tiny_tokenizer
from typer.testing import CliRunner, Result

from obliteratus.cli.app import app
from obliteratus.pipeline.recipe import load_recipe, parse_recipe

TARGET = [
    f"Tell me about the {color} {thing}."
    for color in ("red", "blue", "old", "tall")
    for thing in ("house", "boat", "hill")
] + ["Who paints the fence?", "May I sing on Sundays?"]
CONTROL = [f"How do I count to {n}, slowly?" for n in range(14)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    paths = {"target": tmp_path / "target.txt", "control": tmp_path / "control.txt"}
    paths["target"].write_text("\n".join(TARGET))
    paths["control"].write_text("\n".join(CONTROL))
    return paths


def run(model: Path, files: dict[str, Path], *more: object) -> Result:
    return call("run", model, "--target", files["target"], "--control", files["control"], "--quiet", "--force", *more)


@pytest.mark.parametrize("form", ["merged", "adapter", "plan"])
def test_run_saves_what_it_says(model: Path, files: dict[str, Path], tmp_path: Path, form: str) -> None:
    out = tmp_path / "out"
    result = run(model, files, "--out", out, "--save", form, "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document == json.loads((out / "run.json").read_text())
    assert document["status"] == "done"
    assert {"value", "low", "high", "n", "unit"} == set(document["after"]["refusal.target"])
    assert set(document["saved"]["files"]) <= {p.name for p in out.iterdir()}
    assert not (tmp_path / "out.partial").exists()


def test_without_out_nothing_is_written(model: Path, files: dict[str, Path], tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert run(model, files).exit_code == 0
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"target": None}, "this prompt file does not exist"),
        ({"target": b""}, "is empty"),
        ({"target": b"caf\xe9"}, "not UTF-8"),
        ({"target": b"a\0b"}, "binary file"),
        ({"target": "\n".join(CONTROL).encode()}, "same prompts"),
        ({"target": "\n".join([*TARGET, CONTROL[0]]).encode()}, "in target and in control"),
    ],
)
def test_bad_prompt_files(model: Path, files: dict[str, Path], tmp_path: Path, change: dict, said: str) -> None:
    for group, content in change.items():
        files[group].unlink() if content is None else files[group].write_bytes(content)
    assert said in one_line(run(model, files, "--out", tmp_path / "out"))
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--method", "basicc"], "did you mean 'basic'?"),
        (["--set", "distill.0.use=mean_dif"], "did you mean 'mean_diff'?"),
        (["--set", "excise.strength=9"], "excise.strength"),
        (["--set", "excise.nrom=rows"], "nrom"),
        (["--set", "distill.7.k=1"], "no entry '7'"),
        (["--set", "nonsense"], "path=value"),
        (["--set", "excise.parts=['mlp.up']"], "names no part"),
        (["--save", "mergedd"], "did you mean 'merged'?"),
        (["--dtype", "float31"], "float32"),
        (["--resume"], "--out"),
    ],
)
def test_bad_options(model: Path, files: dict[str, Path], options: list[str], said: str) -> None:
    assert said in one_line(run(model, files, *options))


@pytest.mark.parametrize(
    ("words", "new"),
    [
        (["run", "model", "--quantise", "4bit"], "'--quantise' is now called '--quantize'"),
        (["verify", "model", "--quantise=4bit"], "'--quantise' is now called '--quantize'"),
        (["study-from-yaml", "old.yaml"], "'study-from-yaml' is now called 'study --from-yaml'"),
    ],
)
def test_a_renamed_option_or_command_names_the_new_one(words: list[str], new: str) -> None:
    assert new in one_line(CliRunner().invoke(app, words))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--set", "distill=[{use='svd', k=40}]"], "k=40 directions need at least 40 target prompts; got 8"),
        (["--set", "distill=[{use='svd', k=2, paired=true}]"], ""),
        (
            ["--set", "distill=[{use='mean_diff'}, {use='union', other={use='whitened_svd', k=9}}]"],
            "'whitened_svd': k=9",
        ),
        (["--set", "distill=[{use='bypass_contrast'}]"], "--bypass"),
        (["--set", "distill=[{use='sae'}]"], "prompts are too few to train on"),
        (["--set", "distill=[{use='sae', stream=1, pretrained='WIDER'}]"], "is 48 wide and this model's stream is 32"),
        (["--set", "excise.parts=['mlp.up']"], "names no part"),
        (["--set", "excise.norm=['rows', 'columns']"], "excise.norm"),
        (["--method", "reflected", "--set", "passes=2"], "turns the first one's reflection back"),
    ],
)
def test_what_cannot_work_is_refused_before_weights_are_read(
    model: Path, files: dict[str, Path], tmp_path: Path, options: list[str], said: str
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (bare / name).write_bytes((model / name).read_bytes())
    shapes = {"W_enc": (48, 5), "b_enc": (5,), "W_dec": (5, 48), "b_dec": (48,)}
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "wider.safetensors")
    options = [o.replace("WIDER", str(tmp_path / "wider.safetensors")) for o in options]
    line = one_line(run(bare, files, "--set", "probe.keep=rows", *options))
    assert said in line if said else "weights" in line  # the one that could work gets as far as the weights


def test_a_model_that_cannot_be_opened_leaves_no_folder(model: Path, files: dict[str, Path], tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((model / "config.json").read_bytes())
    one_line(run(bare, files, "--out", tmp_path / "out"))
    assert not list(tmp_path.glob("out*"))


def test_output_folder_in_use(model: Path, files: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    assert "in use" in one_line(run(model, files, "--out", tmp_path / "out"))
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["precious.txt"]


def test_too_little_disk(model: Path, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda place: type("Usage", (), {"free": 1000})())
    assert "make room" in one_line(run(model, files, "--out", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_nan_weights_are_named(model: Path, files: dict[str, Path], tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    for file in model.iterdir():
        (bad / file.name).write_bytes(file.read_bytes())
    state = load_file(bad / "model.safetensors")
    state["model.layers.1.mlp.down_proj.weight"][0, 0] = torch.nan
    save_file(state, bad / "model.safetensors", metadata={"format": "pt"})
    assert "model.layers.1.mlp.down_proj.weight" in one_line(run(bad, files))


def test_apply_makes_the_same_model_and_refuses_others(model: Path, files: dict[str, Path], tmp_path: Path) -> None:
    assert run(model, files, "--out", tmp_path / "first").exit_code == 0
    assert call("apply", tmp_path / "first", model, "--out", tmp_path / "second", "--quiet").exit_code == 0
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    other = tmp_path / "other"
    tiny("llama", seed=1).save_pretrained(other)
    tiny_tokenizer().save_pretrained(other)
    assert "another model" in one_line(call("apply", tmp_path / "first", other, "--out", tmp_path / "third", "--quiet"))
    assert not list(tmp_path.glob("third*"))


def test_verify_of_the_saved_model_repeats_the_run(model: Path, files: dict[str, Path], tmp_path: Path) -> None:
    assert run(model, files, "--out", tmp_path / "out").exit_code == 0
    sources = ["--target", files["target"], "--control", files["control"]]
    result = call("verify", tmp_path / "out", "--against", model, *sources, "--json", "--quiet")
    assert result.exit_code == 0, result.output
    told, found = json.loads((tmp_path / "out" / "run.json").read_text()), json.loads(result.stdout)
    for name, score in told["after"].items():
        assert found["after"][name]["value"] == pytest.approx(score["value"], abs=1e-3), name


def test_methods_and_inspect(model: Path) -> None:
    listed = call("methods")
    assert all(name in listed.stdout for name in ("basic", "advanced", "failspy", "gabliteration"))
    assert load_recipe("basic") == parse_recipe(tomllib.loads(call("methods", "basic").stdout), "basic")  # valid TOML
    assert "did you mean" in one_line(call("methods", "basicc"))
    assert json.loads(call("inspect", model, "--json").stdout)["coverage"]["share"] == 1.0
    assert "model.layers.0.mlp.down_proj" in call("inspect", model, "--sites").stdout.replace("\n", "")


def started(model: Path, files: dict[str, Path], out: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "obliteratus", "run", str(model), "--out", str(out), *more]
    command += ["--force", *(x for group, path in files.items() for x in (f"--{group}", str(path)))]
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it, children too
    own = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=own, preexec_fn=heard)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_run_resumes(model: Path, files: dict[str, Path], tmp_path: Path, number: signal.Signals) -> None:
    out, slow = tmp_path / "out", ("--set", "verify.0.tokens=200")  # seconds of generation to interrupt
    mark = tmp_path / "out.partial" / "VERIFY-before.done"
    for _ in range(3):  # on a crowded machine a run may end before this process is given its turn
        shutil.rmtree(out, ignore_errors=True)
        process = started(model, files, out, *slow)
        deadline = time.monotonic() + 120
        while not mark.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        if mark.exists():
            break
    assert mark.exists(), said
    assert process.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL), said
    assert not out.exists()
    assert "--resume" in one_line(run(model, files, "--out", out, *slow))
    assert "another recipe" in one_line(run(model, files, "--out", out, "--resume"))
    kept = mark.read_text()
    resumed = run(model, files, "--out", out, "--resume", *slow)
    assert resumed.exit_code == 0, resumed.output
    seconds = json.loads((out / "run.json").read_text())["seconds"]
    assert seconds["VERIFY before"] == json.loads(kept)["seconds"]  # taken over, not measured again


def test_no_command_prints_to_stdout_beside_json(model: Path, files: dict[str, Path]) -> None:
    result = call("run", model, "--target", files["target"], "--control", files["control"], "--json", "--force")
    json.loads(result.stdout)
    assert re.search("VERIFY", result.stderr)  # notes are there, on the other stream


@pytest.mark.parametrize("command", [("run",), ("run", "--method", "informed"), ("search", "--trials", "2")])
def test_a_model_that_shows_nothing_is_not_edited(
    model: Path, files: dict[str, Path], tmp_path: Path, command: tuple[str, ...]
) -> None:
    """A tiny random model refuses nothing."""
    for group, path in files.items():
        rows = [{"prompt": f"{group} {i}", "split": part} for part in ("fit", "search", "report") for i in range(8)]
        rows = [{**row, "prompt": f"{row['prompt']} {row['split']}"} for row in rows]
        path.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    name, *more = command
    sources = [x for group, path in files.items() for x in (f"--{group}", path.with_suffix(".jsonl"))]
    before, out = sorted(tmp_path.iterdir()), tmp_path / "out"
    said = one_line(call(name, model, *sources, "--quiet", *more, "--out", out))
    assert "0 of 8 target and 0 of 8 control answers show refusal" in said
    assert "--force" in said
    assert sorted(tmp_path.iterdir()) == before


def test_a_forced_edit_says_so_everywhere(model: Path, files: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(model, files, "--out", out, "--save", "plan")
    assert result.exit_code == 0, result.output
    reason = json.loads((out / "run.json").read_text())["presence"]["against"]
    assert "show refusal" in reason
    for text in (result.stdout, (out / "README.md").read_text()):
        assert "the edit was forced" in " ".join(text.split())
