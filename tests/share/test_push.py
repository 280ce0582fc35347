"""What push uploads holds nothing private, arrives whole or not at all, and every failure of a hub is one line."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import ModelCard, constants
from tests.support.command_line import call, one_line
from tests.support.fake_hub import TOKEN, FakeHub, Repo, fake_hub
from tests.support.shared_runs import TinyRun, find_private, make_run
from typer.testing import CliRunner

from obliteratus.cli.app import app

REPO = "ann/edited"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return make_run(tmp_path_factory.mktemp("private-place"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    with fake_hub(monkeypatch, tmp_path / "cache") as found:
        yield found


@pytest.fixture
def copy(made: TinyRun, tmp_path: Path) -> Path:
    """A copy of the run's folder, to be changed."""
    return Path(shutil.copytree(made.out, tmp_path / "copy"))


def push(folder: Path, *options: str) -> Any:
    return call("push", folder, REPO, "--quiet", *options)


def test_nothing_private_is_uploaded(made: TinyRun, hub: FakeHub) -> None:
    assert len(made.prompts) == 72
    assert made.answers
    assert find_private((made.out / "answers.jsonl").read_bytes(), made)  # what is looked for can be found
    assert str(made.place) in (made.out / "run.json").read_text()
    result = push(made.out, "--yes")
    assert result.exit_code == 0, result.output
    assert find_private(hub.all_bytes, made) == []
    names = set(hub.repos[REPO].files)
    assert {"README.md", "run.json", "reproduce.json", "plan.json", "plan.safetensors", "model.safetensors"} <= names
    assert not {"index.html", "answers.jsonl", "first_tokens.jsonl"} & names


@pytest.mark.parametrize("form", ["adapter", "plan"])
def test_other_forms_hold_nothing_private_either(made: TinyRun, hub: FakeHub, tmp_path: Path, form: str) -> None:
    """An adapter's configuration names the folder of its base."""
    applied = call("apply", made.out, made.model, "--out", tmp_path / form, "--save", form, "--quiet")
    assert applied.exit_code == 0, applied.output
    result = push(tmp_path / form, "--yes")
    assert result.exit_code == 0, result.output
    assert find_private(hub.all_bytes, made) == []
    assert str(tmp_path).encode() not in hub.all_bytes
    assert ("adapter_config.json" in hub.repos[REPO].files) == (form == "adapter")


def test_prompts_and_answers_go_where_they_are_asked_for(made: TinyRun, hub: FakeHub) -> None:
    assert "add --with-prompts" in one_line(push(made.out, "--yes", "--with-answers"))
    assert push(made.out, "--yes", "--with-prompts").exit_code == 0
    files = hub.repos[REPO].files
    rows = [json.loads(line) for line in files["prompts/target.jsonl"].splitlines()]
    assert [row["prompt"] for row in rows] == made.prompts[:36]
    assert "answers.jsonl" not in files
    assert not any(answer.encode() in hub.all_bytes for answer in made.answers)
    assert push(made.out, "--with-prompts", "--with-answers").exit_code == 0
    assert files["answers.jsonl"] == (made.out / "answers.jsonl").read_bytes()
    assert "index.html" in files


def test_prompts_that_changed_since_are_not_uploaded(made: TinyRun, hub: FakeHub, tmp_path: Path) -> None:
    place = Path(shutil.copytree(made.place, tmp_path / "moved"))
    record = place / "out" / "run.json"
    record.write_text(record.read_text().replace(str(made.place), str(place)))
    (place / "target.txt").write_text("\n".join([*made.prompts[:35], "Something # else entirely now?"]))
    assert "no longer the target prompts" in one_line(push(place / "out", "--yes", "--with-prompts"))
    assert hub.requests == []


def test_a_dry_run_lists_files_and_asks_nobody(made: TinyRun, hub: FakeHub) -> None:
    result = push(made.out, "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["files"]["model.safetensors"] == (made.out / "model.safetensors").stat().st_size
    assert found["left_out"]["answers.jsonl"] == "shows prompts and answers"
    assert found["pushed"] is None
    assert "Nothing was sent" in push(made.out, "--dry-run").stdout
    assert hub.requests == []


def test_no_repository_is_made_unasked(made: TinyRun, hub: FakeHub) -> None:
    """Where nobody can answer, the line says what to pass."""
    line = one_line(push(made.out))
    assert f"{REPO} does not exist" in line
    assert "--yes" in line
    assert hub.repos == {}


@pytest.mark.parametrize(("answer", "made_there"), [("y\n", True), ("n\n", False), ("\n", False), ("", False)])
def test_the_terminal_is_asked_before_a_repository_is_made(
    made: TinyRun, hub: FakeHub, monkeypatch: pytest.MonkeyPatch, answer: str, made_there: bool
) -> None:
    terminal = SimpleNamespace(isatty=lambda: True)
    monkeypatch.setattr("obliteratus.cli.push.sys", SimpleNamespace(stdin=terminal, stderr=terminal))
    result = CliRunner().invoke(app, ["push", str(made.out), REPO, "--quiet"], input=answer)
    assert "Make it as a private repository? [y/N]" in result.stderr
    assert (result.exit_code == 0) == made_there
    assert set(hub.repos) == ({REPO} if made_there else set())


@pytest.mark.parametrize(("options", "private"), [(["--yes"], True), (["--yes", "--public"], False)])
def test_a_repository_is_private_unless_asked_otherwise(
    made: TinyRun, hub: FakeHub, options: list[str], private: bool
) -> None:
    result = push(made.out, *options, "--json")
    assert result.exit_code == 0, result.output
    assert hub.repos[REPO].private is private
    pushed = json.loads(result.stdout)["pushed"]
    assert (pushed["private"], pushed["created"], pushed["repo"]) == (private, True, REPO)


def test_a_repository_that_exists_needs_no_question(made: TinyRun, hub: FakeHub) -> None:
    hub.repos[REPO] = Repo(private=False)
    assert push(made.out).exit_code == 0
    assert hub.repos[REPO].commits == 1


STEPS = {
    "look": ("GET", f"/api/models/{REPO}"),
    "create": ("POST", "/api/repos/create"),
    "modes": ("POST", "/preupload/"),
    "batch": ("POST", "/info/lfs/objects/batch"),
    "store": ("PUT", "/store/"),
    "commit": ("POST", "/commit/"),
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(("status", "said"), [(401, "token"), (429, "fewer requests"), (500, "the hub fails (500)")])
def test_a_failure_is_one_line_and_leaves_nothing(
    made: TinyRun, hub: FakeHub, step: str, status: int, said: str
) -> None:
    method, part = STEPS[step]
    hub.fault = lambda m, path: status if m == method and part in path else 0
    line = one_line(push(made.out, "--yes"))
    assert said in line
    assert REPO in line
    assert all(not repo.files for repo in hub.repos.values())
    assert any(part in path for _, path in hub.requests)


def test_an_interrupted_push_goes_on_where_it_stopped(made: TinyRun, hub: FakeHub) -> None:
    """Each large file is sent once, and the repository shows all files at once."""
    hub.fault = lambda method, path: 500 if method == "PUT" and len(hub.sent) == 1 else 0
    one_line(push(made.out, "--yes"))
    assert len(hub.sent) == 1
    assert hub.repos[REPO].files == {}
    hub.fault = lambda method, path: 0
    assert push(made.out).exit_code == 0
    assert len(hub.sent) == len(set(hub.sent)) == 3
    assert hub.repos[REPO].files["model.safetensors"] == (made.out / "model.safetensors").read_bytes()
    assert push(made.out).exit_code == 0  # and once more nothing is new
    assert (len(hub.sent), hub.repos[REPO].commits) == (3, 1)


def test_a_hub_that_hangs_up(made: TinyRun, hub: FakeHub) -> None:
    hub.fault = lambda method, path: -1
    assert "cannot be reached" in one_line(push(made.out, "--yes"))


def test_a_hub_out_of_reach(made: TinyRun, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the port for discarding: nobody listens
    assert "cannot be reached" in one_line(push(made.out, "--yes"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in one_line(push(made.out, "--yes"))


def test_the_program_itself_with_another_endpoint(made: TinyRun, hub: FakeHub, tmp_path: Path) -> None:
    """The hub's client as users set it up: HF_ENDPOINT and HF_TOKEN, in a process of its own."""
    own = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "obliteratus", "push", str(made.out), REPO, "--yes", "--quiet"]

    def start(status: int) -> subprocess.CompletedProcess[str]:
        hub.fault = lambda method, path: status
        return subprocess.run(command, env={**os.environ, **own}, capture_output=True, text=True, check=False)

    failed = start(500)
    assert failed.returncode == 2, failed.stderr
    assert failed.stderr.startswith(f"error: {REPO}: the hub fails (500)")
    assert len(failed.stderr.splitlines()) == 1
    sent = start(0)
    assert sent.returncode == 0, sent.stderr
    assert f"{hub.url}/{REPO} (private, made for it)" in sent.stdout
    assert "model.safetensors" in hub.repos[REPO].files


def test_without_a_token_or_with_a_wrong_one(made: TinyRun, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "w" * 20)
    line = one_line(push(made.out, "--yes"))
    assert "does not accept the token (401)" in line
    assert "wwww" not in line
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere")
    assert "hf auth login" in one_line(push(made.out, "--yes"))


@pytest.mark.parametrize("name", ["edited", "ann/", "/edited", "ann/edited/more", "ann/ed ited", "ann/-edited"])
def test_names_that_no_repository_may_have(made: TinyRun, hub: FakeHub, name: str) -> None:
    assert "owner/name" in one_line(call("push", made.out, name, "--quiet"))
    assert hub.requests == []


def test_a_folder_that_is_no_run(hub: FakeHub, tmp_path: Path) -> None:
    assert "there is no run.json" in one_line(push(tmp_path))


def test_a_file_with_a_prompt_in_it_stays_here(made: TinyRun, hub: FakeHub, copy: Path) -> None:
    """Notes from the base model's folder are left out; what the model needs is refused."""
    record = json.loads((copy / "run.json").read_text())
    record["saved"]["files"]["notes.txt"] = {"bytes": 1, "sha256": "0" * 64}
    (copy / "run.json").write_text(json.dumps(record))
    (copy / "notes.txt").write_text(f"I tried: {made.prompts[0]}")
    result = push(copy, "--yes", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["left_out"]["notes.txt"] == "holds the text of a prompt"
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "note": made.prompts[0]}))
    assert "config.json: this file holds the text of a prompt" in one_line(push(copy, "--yes"))


def test_paths_are_taken_out_of_configurations(made: TinyRun, hub: FakeHub, copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "_name_or_path": "/data/secret/llama", "x": str(copy)}))
    assert push(copy, "--yes").exit_code == 0
    sent = json.loads(hub.repos[REPO].files["config.json"])
    assert sent["_name_or_path"] == "…/llama"
    assert "secret" not in str(sent)
    assert sent["hidden_size"] == config["hidden_size"]
    assert "secret" in (copy / "config.json").read_text()  # the run's own file stays as it is


def test_the_record_has_the_sums_of_what_was_uploaded(made: TinyRun, hub: FakeHub, copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "_name_or_path": "/data/secret/llama"}))
    assert push(copy, "--yes").exit_code == 0
    files = hub.repos[REPO].files
    sums = json.loads(files["run.json"])["saved"]["files"]
    assert {"config.json", "model.safetensors", "plan.json"} <= sums.keys()
    for name, one in sums.items():
        assert hashlib.sha256(files[name]).hexdigest() == one["sha256"], name


def test_the_card_says_what_was_done_and_measured(made: TinyRun, hub: FakeHub, tmp_path: Path) -> None:
    assert push(made.out, "--yes").exit_code == 0
    (tmp_path / "README.md").write_bytes(hub.repos[REPO].files["README.md"])
    card = ModelCard.load(tmp_path / "README.md")
    text = " ".join(card.text.split())
    for part in (
        "edited on purpose so that it behaves differently from its base",
        "The base model's license still applies",
        "held out",
        "basic",
        f'from_pretrained("{REPO}")',
        f"obliteratus reproduce hub:{REPO}",
        "digest of its weights",
    ):
        assert part in text
    record = json.loads((made.out / "run.json").read_text())
    assert f"{100 * record['after']['refusal.target']['value']:.1f}%" in text
