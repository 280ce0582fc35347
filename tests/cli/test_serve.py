"""`obliteratus serve`: what cannot be is one line before any model is loaded, and a signal ends it cleanly."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import openai
import pytest
from tests.support.api_server import PATIENCE
from tests.support.served import save_model_and_plans
from typer.testing import CliRunner

from obliteratus.cli.app import app
from obliteratus.cli.serve import describe_counts
from obliteratus.core.errors import UserError
from obliteratus.excise.plan import save_plan
from obliteratus.serve.open import open_to_serve


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``model``, and two plans for it."""
    return save_model_and_plans(tmp_path_factory.mktemp("serve"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_until_a_signal_comes(folders: Path, number: int) -> None:
    plans = ["--plan", str(folders / "one"), "--plan", f"half={folders / 'two'}"]
    command = [sys.executable, "-m", "obliteratus", "serve", str(folders / "model"), *plans, "--port", "0", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ})
    assert process.stdout is not None
    text = ""
    while not text.endswith("}\n"):
        text += process.stdout.readline()
        assert process.poll() is None
    said = json.loads(text)
    assert said["models"] == ["model", "one", "half"]
    client = openai.OpenAI(base_url=said["url"], api_key="none")
    found = client.chat.completions.create(
        model="half", messages=[{"role": "user", "content": "Why?"}], max_tokens=3, extra_body={"strength": 0.5}
    )
    assert found.model == "half"
    process.send_signal(number)
    out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out) == (0, "")
    assert err.splitlines()[-1].startswith("ended; requests: 1 ")
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--strength 3", "strength 3: give a number from -1 to 2"),
        ("--rows 0", "--rows 0: at least 1 answer"),
        ("--queue -1", "--queue -1: give 0 or more"),
        ("--time-limit 0", "--time-limit 0: give a positive number"),
        ("--grace -1", "--grace -1: give 0 or more seconds"),
        ("--tokens 0", "tokens 0: an answer needs at least 1"),
        ("--temperature nan", "temperature nan: give 0 for greedy answers"),
        ("--host 0.0.0.0", "--host 0.0.0.0: others can reach this address; give --api-key"),
        ("--api-key short", "--api-key: give at least 16 ASCII characters"),
        ("--port 99999", "--port 99999: give one from 0 to 65535"),
        ("--plan three", "three: there is no plan.safetensors"),
        ("--plan =two", "--plan =two: give the folder of a plan, or NAME=FOLDER"),
        ("--plan one --plan one=two", "--plan one: two plans have this name"),
        ("--plan model=two", "--plan model: the unedited model has this name"),
    ],
)
def test_what_cannot_be_is_one_line(folders: Path, options: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folders)
    result = CliRunner().invoke(app, ["serve", "model", "--quiet", "--port", "0", *options.split()])
    assert result.exit_code == 2
    assert said in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_port_that_is_taken_is_told_before_the_model_is_opened(folders: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = CliRunner().invoke(app, ["serve", "no-such-model", "--port", str(taken.getsockname()[1])])
    assert result.exit_code == 2
    assert "cannot listen there" in result.stderr


def test_plans_are_named_by_their_folders_or_as_given(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folders)
    assert list(open_to_serve("model", ["two", "mild=one", "strong=one"])[1]) == ["two", "mild", "strong"]
    Path("a=b").mkdir()
    save_plan(open_to_serve("model", ["one"])[1]["one"], Path("a=b/plan"))
    assert list(open_to_serve("model", ["a=b/plan"])[1]) == ["plan"]  # a folder that is there is a folder
    with pytest.raises(UserError, match="strong: two plans"):
        open_to_serve("model", ["strong=one", "strong=two"])


def test_the_last_line_counts_requests() -> None:
    assert describe_counts({}) == "no requests came"
    counted = describe_counts({"length": 2, "canceled": 1, "late": 0})
    assert counted == "requests: 2 cut at their length, 1 given up by their client"
