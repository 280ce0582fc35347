"""The server lets in who may come in, and sends folders as whole ZIP files."""

from __future__ import annotations

import asyncio
import io
import zipfile
from pathlib import Path
from typing import Any

import pytest

from obliteratus.core.errors import UserError
from obliteratus.serve.listen import is_loopback, open_socket
from obliteratus.serve.ui.server import (
    BLOCK,
    Gate,
    choose_token,
    find_download,
    zip_folder,
)
from obliteratus.serve.ui.workspace import Workspace

TOKEN = "a-token-of-enough-characters"


async def inner(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """The page behind the gate."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"the page"})


def fetch(token: str = "", query: str = "", kind: str = "http", **headers: str) -> tuple[int, dict[str, str], bytes]:
    """Return status, headers and body of an answer; a closed websocket has its code as status."""
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": kind, "path": "/", "query_string": query.encode(), "headers": encoded}
    asyncio.run(Gate(inner, token)(scope, None, send))
    if kind == "websocket" and sent[0]["type"] == "websocket.close":
        return sent[0]["code"], {}, b""
    found = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], found, sent[1]["body"]


@pytest.mark.parametrize("host", ["127.0.0.1:7860", "localhost:7860", "localhost", "[::1]:7860", "[::1]"])
def test_this_machine_may_come_in_by_its_own_names(host: str) -> None:
    status, headers, body = fetch(host=host)
    assert (status, body) == (200, b"the page")
    assert "default-src 'self'" in headers["content-security-policy"]


@pytest.mark.parametrize("host", ["evil.example", "evil.example:7860", "127.0.0.1.evil.example", "", "localhost.evil"])
def test_no_page_reaches_the_server_under_a_name_of_its_own(host: str) -> None:
    status, _, body = fetch(host=host)
    assert status == 403
    assert b"the page" not in body


def test_with_a_token_nobody_comes_in_without_it() -> None:
    for headers in ({"host": "127.0.0.1"}, {"host": "x", "cookie": "obliteratus_token=wrong"}, {"cookie": "a"}, {}):
        assert fetch(TOKEN, **headers)[0] == 403
    assert fetch(TOKEN, query="token=wrong")[0] == 403
    assert fetch(TOKEN, query="token=")[0] == 403
    assert fetch(TOKEN, kind="websocket")[0] == 1008


def test_the_address_with_the_token_gives_a_cookie_that_opens() -> None:
    status, headers, _ = fetch(TOKEN, query=f"token={TOKEN}", host="box.lan:7860")
    assert (status, headers["location"]) == (303, "/")  # the token is gone from the address
    cookie = headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    assert fetch(TOKEN, host="box.lan:7860", cookie=cookie.split(";")[0])[0] == 200


def test_a_token_is_made_where_others_can_reach_the_server() -> None:
    assert choose_token("127.0.0.1", "") == ""
    assert choose_token("127.0.0.1", TOKEN) == TOKEN
    made = {choose_token(host, "") for host in ("0.0.0.0", "192.168.1.5", "box.lan", "::")}
    assert len(made) == 4
    assert all(len(token) >= 24 for token in made)
    for weak in ("short", "é" * 20, "a b\n" * 9):
        with pytest.raises(UserError, match="at least 16"):
            choose_token("0.0.0.0", weak)


def test_what_loopback_is() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "localhost", "::1", "[::1]")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "box.lan", "", "localhost.evil.example")))


def test_a_port_in_use_is_one_line() -> None:
    with open_socket("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(UserError, match="cannot listen there"):
            open_socket("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(UserError, match="give one from 0 to 65535"):
        open_socket("127.0.0.1", 70_000)
    with pytest.raises(UserError, match="cannot listen there"):
        open_socket("no.such.host.invalid", 0)


def test_a_zip_holds_every_byte_and_is_sent_in_pieces(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "front" / "1").mkdir(parents=True)
    files = {"a.txt": b"text", "front/1/plan.safetensors": bytes(range(256)) * (3 * BLOCK // 256), "empty": b""}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    pieces = list(zip_folder(folder))
    assert max(map(len, pieces)) < 2 * BLOCK
    with zipfile.ZipFile(io.BytesIO(b"".join(pieces))) as archive:
        assert archive.testzip() is None
        assert {name: archive.read(f"run/{name}") for name in files} == files
        assert len(archive.namelist()) == len(files)


def test_downloads_are_of_runs_and_exports_alone(tmp_path: Path) -> None:
    space = Workspace.create(tmp_path / "work")
    folder = space.root / "runs" / "first"
    folder.mkdir()
    (folder / "run.json").write_text("{}")
    (tmp_path / "secret").write_text("x")
    (folder / "link").symlink_to(tmp_path / "secret")
    assert find_download(space, "runs", "first") == folder
    assert find_download(space, "runs", "first", "run.json") == folder / "run.json"
    asked = [("runs", "first", "../../../secret"), ("runs", "first", "link"), ("runs", "..", "x"), ("runs", "none", "")]
    asked += [("prompts", "a", ""), (".uploads", "a", ""), ("runs", "first", "/etc/passwd"), ("runs", "first", "no")]
    for kind, name, file in asked:
        with pytest.raises(UserError):
            find_download(space, kind, name, file)
