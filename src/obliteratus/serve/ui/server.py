"""The web server: on loopback, or behind a token; it answers with nothing that makes a browser ask another machine."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http.cookies import SimpleCookie
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs
from zipfile import ZIP_STORED, ZipFile, ZipInfo

from obliteratus.core.errors import UserError
from obliteratus.serve.listen import is_loopback, matches, names_loopback
from obliteratus.serve.ui.workspace import Workspace, list_files

COOKIE = "obliteratus_token"
SHORTEST_TOKEN = 16  # characters: 64 bits even as hexadecimal digits
BLOCK = 1 << 20  # bytes of a file that are held at once while it is sent
# No address but this server's. Gradio's own pages hold scripts and styles inside, and workers and pictures as blobs.
POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-src 'self' data: blob:; form-action 'self'; "
    "frame-ancestors 'self'; base-uri 'self'"
)
HEADERS = (
    (b"content-security-policy", POLICY.encode()),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
)
Scope = dict[str, Any]


def choose_token(host: str, token: str) -> str:
    """Return the token that browsers must have: the given one, or a new one where others can reach the address.

    It is '' on loopback if none is given. Raises UserError for one that could be guessed.
    """
    if token and (len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isprintable()):
        raise UserError(f"--token: give at least {SHORTEST_TOKEN} ASCII characters, or leave it out and one is made")
    return token or ("" if is_loopback(host) else secrets.token_urlsafe(24))


@dataclass(frozen=True)
class Gate:
    """ASGI middleware that lets in who may come in, and adds headers that keep the page from asking other machines."""

    app: Any
    token: str = ""
    """Needed in the address once, and then kept as a cookie. Empty: none is needed, and the server must be called by a
    loopback name, so that no web page can reach it under a name of its own."""

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Answer a request."""
        if scope["type"] not in ("http", "websocket"):  # starting and ending
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        offered = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("token", [""])[0]
        if self.token and scope["type"] == "http" and matches(offered, self.token):
            await _reply(send, 303, b"", {"location": scope["path"], "set-cookie": make_cookie(self.token)})
        elif not self.admits(headers):
            await _refuse(scope, send, b"This address needs its token: open the whole address that was printed.\n")
        else:
            await self.app(scope, receive, _with_headers(send))

    def admits(self, headers: Mapping[str, str]) -> bool:
        """Return whether a request with these headers may come in."""
        if self.token:
            cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
            return cookie is not None and matches(cookie.value, self.token)
        return names_loopback(headers.get("host", ""))


def make_cookie(token: str) -> str:
    """Return the header that keeps the token in the browser until that is closed. Scripts do not see it."""
    cookie: SimpleCookie = SimpleCookie({COOKIE: token})
    cookie[COOKIE].update({"httponly": "true", "samesite": "Strict", "path": "/"})
    return cookie[COOKIE].OutputString()


async def _refuse(scope: Scope, send: Any, text: bytes) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
    else:
        await _reply(send, 403, text, {"content-type": "text/plain; charset=utf-8"})


async def _reply(send: Any, status: int, body: bytes, headers: Mapping[str, str]) -> None:
    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": [*encoded, *HEADERS]})
    await send({"type": "http.response.body", "body": body})


def _with_headers(send: Any) -> Any:
    async def send_with_headers(message: Scope) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), *HEADERS]}
        await send(message)

    return send_with_headers


# ------------------------------------------------------------------------------------------ downloads
class _Chunks:
    """A file that a ZIP is written to and that gives what was written so far."""

    def __init__(self) -> None:
        self.held: list[bytes] = []

    def write(self, data: bytes) -> int:
        self.held.append(bytes(data))
        return len(data)

    def flush(self) -> None:
        """Do nothing: what is written is taken from memory."""

    def take(self) -> bytes:
        taken, self.held = b"".join(self.held), []
        return taken


def zip_folder(folder: Path) -> Iterator[bytes]:
    """Yield a ZIP file of all files below a folder, uncompressed, without holding more than a block of them."""
    chunks = _Chunks()
    sink: Any = chunks  # a file that cannot seek will do
    with ZipFile(sink, "w", ZIP_STORED) as archive:
        for path in list_files(folder):
            entry = ZipInfo.from_file(path, Path(folder.name) / path.relative_to(folder))
            with path.open("rb") as file, archive.open(entry, "w", force_zip64=True) as target:
                while block := file.read(BLOCK):
                    target.write(block)
                    yield chunks.take()
    yield chunks.take()


def find_download(workspace: Workspace, kind: str, name: str, file: str = "") -> Path:
    """Return the folder or file that a link names. Raises UserError unless it is there, in the workspace."""
    if kind not in ("runs", "exports"):
        raise UserError(f"{kind[:40]}: there is nothing to download here")
    folder = workspace.path(kind, name)
    path = folder / file
    inside = path.resolve().is_relative_to(folder.resolve())
    if not (inside and (path.is_file() if file else path.is_dir())):
        raise UserError(f"{kind}/{name}: there is no such file")
    return path
