"""Data sets on the hub: which files a source stands for, against a small server on this machine."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest
from huggingface_hub import constants
from tests.support.notes import Notes

from obliteratus.core.errors import UserError
from obliteratus.core.progress import report_to
from obliteratus.prompts import load_prompts
from obliteratus.prompts.hub import choose_files, lay_out_converted, lay_out_files

COMMITS = {"main": "a" * 40, "refs/convert/parquet": "b" * 40}


# ------------------------------------------------------------------------------------------------ layouts
def test_the_hubs_conversion_names_configurations_and_splits() -> None:
    files = [
        "README.md",
        "benign/train/0000.parquet",
        "benign/test/0000.parquet",
        "hard/train/0001.parquet",
        "x.parquet",
    ]
    assert lay_out_converted(files) == {
        "benign": {"train": ["benign/train/0000.parquet"], "test": ["benign/test/0000.parquet"]},
        "hard": {"train": ["hard/train/0001.parquet"]},
    }


def test_a_card_says_what_belongs_together() -> None:
    card = {
        "configs": [
            {"config_name": "benign", "data_files": [{"split": "train", "path": "benign-*.jsonl"}]},
            {"config_name": "toxic", "data_files": "toxic.jsonl"},
        ]
    }
    files = ["benign-1.jsonl", "benign-2.jsonl", "toxic.jsonl", "other.jsonl"]
    assert lay_out_files(files, card) == {
        "benign": {"train": ["benign-1.jsonl", "benign-2.jsonl"]},
        "toxic": {"train": ["toxic.jsonl"]},
    }


@pytest.mark.parametrize(
    ("files", "layout"),
    [
        (["train.jsonl", "test.jsonl"], {"default": {"train": ["train.jsonl"], "test": ["test.jsonl"]}}),
        (["constraints.jsonl"], {"default": {"constraints": ["constraints.jsonl"]}}),
        (
            ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "README.md"],
            {"default": {"train": ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"]}},
        ),
        (
            ["benign/train.csv", "toxic/train.csv", ".cache.json"],
            {"benign": {"train": ["benign/train.csv"]}, "toxic": {"train": ["toxic/train.csv"]}},
        ),
        (["a_train.json", "a_test.json"], {"default": {"train": ["a_train.json"], "test": ["a_test.json"]}}),
    ],
)
def test_without_a_card_folders_and_names_say_it(files: list[str], layout: Mapping[str, object]) -> None:
    assert lay_out_files(files, {}) == layout


TWO = {"benign": {"train": ["b"], "test": ["c"]}, "toxic": {"eval": ["t"]}}
NO_TRAIN = {"default": {"easy": ["e"], "hard": ["h"]}}


@pytest.mark.parametrize(
    ("layout", "parts", "chosen"),
    [
        (TWO, ["benign"], ("benign", "train", "")),
        (TWO, ["benign", "test"], ("benign", "test", "")),
        (TWO, ["toxic"], ("toxic", "eval", "")),
        (TWO, ["toxic", "eval", "goal"], ("toxic", "eval", "goal")),
        (TWO, ["benign", "goal"], ("benign", "train", "goal")),
        (NO_TRAIN, ["hard"], ("default", "hard", "")),
        (NO_TRAIN, ["default", "easy"], ("default", "easy", "")),
    ],
)
def test_parts_of_a_source(layout: Mapping[str, Mapping[str, list[str]]], parts: list[str], chosen: object) -> None:
    assert choose_files("hub:a/b", layout, parts) == chosen


@pytest.mark.parametrize(
    ("layout", "parts", "problem"),
    [
        (TWO, [], "name one of its configurations, benign, toxic, as hub:owner/name:CONFIGURATION"),
        (TWO, ["train"], "name one of its configurations, benign, toxic"),
        (NO_TRAIN, [], "name one of its splits, easy, hard, as hub:owner/name:default:SPLIT"),
        (
            TWO,
            ["benign", "dev", "goal"],
            "there is no 'dev'; configurations: benign, toxic; splits of benign: train, test",
        ),
        ({}, [], "the data set has no .*json.* file"),
    ],
)
def test_what_is_not_clear_is_asked(
    layout: Mapping[str, Mapping[str, list[str]]], parts: list[str], problem: str
) -> None:
    with pytest.raises(UserError, match=problem):
        choose_files("hub:a/b", layout, parts)


# ------------------------------------------------------------------------------------------------- a server
@dataclass(frozen=True)
class Hub:
    """What the server holds: revision → file → content."""

    revisions: Mapping[str, Mapping[str, str]]

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers and body."""
        parts = unquote(path).strip("/").split("/")
        if parts[:2] == ["api", "datasets"]:
            revision = "/".join(parts[5:]) or "main"
            if revision not in self.revisions:
                return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
            siblings = [{"rfilename": name} for name in self.revisions[revision]]
            body = {"id": "/".join(parts[2:4]), "sha": COMMITS[revision], "siblings": siblings}
            return 200, {"Content-Type": "application/json"}, json.dumps(body).encode()
        _, _, _, _, commit, *file = parts
        revision = next(name for name, sha in COMMITS.items() if sha == commit)
        content = self.revisions[revision]["/".join(file)].encode()
        return (
            200,
            {"X-Repo-Commit": commit, "ETag": f'"{hash(content)}"', "Content-Length": str(len(content))},
            content,
        )


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Mapping[str, str]]]:
    """Files by revision, which a test fills, behind an address that the hub's client takes for the hub."""
    revisions: dict[str, Mapping[str, str]] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, body = Hub(revisions).answer(self.path)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            if "Content-Length" not in headers:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield revisions
    server.shutdown()
    server.server_close()


@pytest.fixture
def control(tmp_path: Path) -> Path:
    path = tmp_path / "control.txt"
    path.write_text("calm\nplain\n")
    return path


def test_a_configuration_is_read_and_its_revision_recorded(serve: dict[str, Mapping[str, str]], control: Path) -> None:
    serve["main"] = {"benign/train.jsonl": '{"goal": "one"}', "toxic/train.jsonl": '{"goal": "two"}'}
    found = load_prompts("hub:owner/name:toxic", control)
    assert [p.text for p in found["target"]] == ["two"]
    assert found.sources["target"] == f"hub:owner/name@{COMMITS['main']}:toxic:train"
    with pytest.raises(UserError, match="name one of its configurations, benign, toxic"):
        load_prompts("hub:owner/name", control)


def test_only_the_split_is_read(serve: dict[str, Mapping[str, str]], control: Path) -> None:
    serve["main"] = {"train.jsonl": '{"goal": "one"}', "constraints.jsonl": '{"goal": "two"}'}
    notes = Notes()
    with report_to(notes):
        found = load_prompts("hub:owner/name", control)
    assert [p.text for p in found["target"]] == ["one"]
    assert any("the split train is taken, of constraints, train" in note for note in notes.texts)


def test_a_revision_that_there_is_not(serve: dict[str, Mapping[str, str]], control: Path) -> None:
    serve["main"] = {"train.jsonl": '{"goal": "one"}'}
    with pytest.raises(UserError, match=r"hub:owner/name@v9: the hub cannot be reached"):
        load_prompts("hub:owner/name@v9", control)
