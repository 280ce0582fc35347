"""A hub on this machine that the hub's own client talks to: repositories in memory, and failures on demand."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _http

TOKEN = "hf_" + "t" * 20
LARGE = (".safetensors", ".gguf", ".bin", "tokenizer.json")
"""Files that go to the store of large ones."""

Fault = Callable[[str, str], int]
"""(method, path) → status to answer with, 0 for none, −1 to hang up."""


@dataclass
class Repo:
    """A repository: its files, and how often it was committed to."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: int = 0

    @property
    def sha(self) -> str:
        return f"{self.commits:040x}"


class FakeHub(ThreadingHTTPServer):
    """A hub that knows one token. fault: what goes wrong, request by request."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, Repo] = {}
        self.store: dict[str, bytes] = {}
        self.sent: list[str] = []
        """SHA-256 of each large file that arrived, in order."""
        self.requests: list[tuple[str, str]] = []
        self.fault: Fault = lambda method, path: 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def all_bytes(self) -> bytes:
        """Everything that ever arrived."""
        return b"".join([*self.store.values(), *(data for r in self.repos.values() for data in r.files.values())])

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a connection that ends early is what some tests are about."""


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: FakeHub

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the tests' output clean."""

    def _handle(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append((self.command, path))
        fault = self.server.fault(self.command, path)
        if fault < 0:
            self.close_connection = True
        elif fault:
            self._send(fault, {"error": "no luck today"}, {"Retry-After": "0"} if fault == 429 else {})
        elif not path.startswith("/store/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            message = {"X-Error-Message": "Invalid credentials in Authorization header"}
            self._send(401, {"error": "Invalid credentials in Authorization header"}, message)
        else:
            self._route(path, body)

    do_GET = do_POST = do_PUT = do_HEAD = _handle

    def _route(self, path: str, body: bytes) -> None:
        parts = path.strip("/").split("/")
        if parts[0] == "store":
            self.server.store[parts[1]] = body
            self.server.sent.append(parts[1])
            self._send(200, {}, {"ETag": parts[1]})
        elif parts == ["api", "repos", "create"]:
            self._create(json.loads(body))
        elif parts == ["api", "validate-yaml"]:
            self._send(200, {"errors": [], "warnings": []})
        elif path.endswith("/info/lfs/objects/batch"):
            self._batch(json.loads(body))
        elif parts[:2] == ["api", "models"]:
            self._repo("/".join(parts[2:4]), parts[4:], body)
        else:
            self._file("/".join(parts[:2]), "/".join(parts[4:]))

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        private = asked.get("private", asked.get("visibility") == "private")
        self.server.repos.setdefault(name, Repo(bool(private)))
        self._send(200, {"url": f"{self.server.url}/{name}", "id": name, "name": name})

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = []
        for one in asked["objects"]:
            there = one["oid"] in self.server.store
            action = {} if there else {"actions": {"upload": {"href": f"{self.server.url}/store/{one['oid']}"}}}
            objects.append({**one, **action})
        self._send(200, {"transfer": "basic", "objects": objects})

    def _repo(self, name: str, rest: list[str], body: bytes) -> None:
        repo = self.server.repos.get(name)
        if repo is None:
            self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif rest[:1] == ["preupload"]:
            self._send(200, {"files": [self._mode(repo, one["path"]) for one in json.loads(body)["files"]]})
        elif rest[:1] == ["commit"]:
            self._commit(repo, name, [json.loads(line) for line in body.splitlines()])
        elif rest[:1] == ["tree"]:
            rows = [{"type": "file", "path": n, "size": len(d), "oid": git_sha(d)} for n, d in repo.files.items()]
            self._send(200, rows)
        else:
            siblings = [{"rfilename": file} for file in repo.files]
            self._send(200, {"id": name, "sha": repo.sha, "private": repo.private, "siblings": siblings})

    def _mode(self, repo: Repo, path: str) -> dict[str, Any]:
        large = path.endswith(LARGE)
        there = repo.files.get(path)
        oid = None if there is None else hashlib.sha256(there).hexdigest() if large else git_sha(there)
        return {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}

    def _commit(self, repo: Repo, name: str, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                repo.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repo.files[value["path"]] = self.server.store[value["oid"]]
        repo.commits += 1
        url = f"{self.server.url}/{name}/commit/{repo.sha}"
        self._send(200, {"commitUrl": url, "commitOid": repo.sha, "success": True})

    def _file(self, name: str, path: str) -> None:
        repo = self.server.repos.get(name)
        if repo is None or path not in repo.files:
            code = "RepoNotFound" if repo is None else "EntryNotFound"
            self._send(404, {"error": code}, {"X-Error-Code": code})
            return
        data = repo.files[path]
        self._send(200, data, {"X-Repo-Commit": repo.sha, "ETag": f'"{git_sha(data)}"'})

    def _send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def git_sha(data: bytes) -> str:
    """The name that git gives a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def fake_hub(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[FakeHub]:
    """A hub that the client in this process takes for the real one, with a token, and without waits between tries."""
    hub = FakeHub()
    threading.Thread(target=hub.serve_forever, args=(0.01,), daemon=True).start()  # seconds until it sees the end
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its protocol needs more servers than this one
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(_http, "time", SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None}))
    yield hub
    hub.shutdown()
    hub.server_close()
