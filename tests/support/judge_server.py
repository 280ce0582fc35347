"""An OpenAI-compatible server on this machine that judges answers, and fails in the ways that servers fail in."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

BEAT = 0.05  # seconds between the bytes of a dribbled reply: many fit into a test's time-out, so each read succeeds


@dataclass(frozen=True)
class Asked:
    """A request as the server got it."""

    number: int
    """Requests before it."""
    again: int
    """Requests about the same answer before it."""
    path: str
    headers: dict[str, str]
    body: dict[str, Any]

    @property
    def system(self) -> str:
        return str(self.body["messages"][0]["content"])

    @property
    def data(self) -> dict[str, str]:
        """The prompt and the answer."""
        found: dict[str, str] = json.loads(self.body["messages"][1]["content"])
        return found

    @property
    def answer(self) -> str:
        return self.data["answer"]


Fault = Callable[[Asked], str]
"""Returns what is to be done with a request: the name of a fault, a JSON document to send, or nothing to judge it."""


def healthy(asked: Asked) -> str:
    return ""


def completion(content: Any) -> str:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]})


BODIES = {
    "html": "<html>Please log in</html>",
    "essay": completion("The answer is polite, and it goes on to explain the matter at length."),
    "both": completion("Yes and no."),
    "doubt": completion("No doubt it declines"),
    "empty": completion(""),
    "null": completion(None),
    "number": completion(1),
    "no choices": '{"choices": []}',
    "no message": '{"choices": [{}]}',
    "list": "[]",
    "nested": "[" * 10_000,
    "huge": completion("yes" + " " * 2**21),
}
"""Replies with status 200 that hold no verdict."""


class JudgeServer(ThreadingHTTPServer):
    """A server that says yes to an answer with "sorry" in it.

    fault: what goes wrong, request by request. slow: seconds that a verdict takes. target: where "redirect" leads.
    message: what the server says beside a status.
    """

    daemon_threads = True
    request_queue_size = 64  # connections at once: with the default of 5, some would wait for a second

    def __init__(self, fault: Fault = healthy, slow: float = 0.0, target: str = "", message: str = "") -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.fault, self.slow, self.target, self.message = fault, slow, target, message
        self.requests: list[Asked] = []
        self.under_way = self.peak = 0
        self.over = threading.Event()
        self.lock = threading.Lock()
        self._seen: Counter[str] = Counter()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    @property
    def answers(self) -> list[str]:
        """The answers that were asked about, in order."""
        return [asked.answer for asked in self.requests]

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()  # seconds until it sees the end
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.over.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a client that gave up is what the tests are about."""

    def record(self, path: str, headers: dict[str, str], body: dict[str, Any]) -> Asked:
        """Keep a request, and count it as under way."""
        with self.lock:
            text = json.dumps(body)
            asked = Asked(len(self.requests), self._seen[text], path, headers, body)
            self.requests.append(asked)
            self._seen[text] += 1
            self.under_way += 1
            self.peak = max(self.peak, self.under_way)
        return asked


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"  # connections are kept, as real servers do
    disable_nagle_algorithm = True  # head and body are two writes, and the second would wait 40 ms
    server: JudgeServer

    def do_POST(self) -> None:
        size = int(self.headers["Content-Length"])
        asked = self.server.record(self.path, dict(self.headers.items()), json.loads(self.rfile.read(size)))
        try:
            self._reply(asked, self.server.fault(asked))
        finally:
            with self.server.lock:
                self.server.under_way -= 1

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the tests' output clean."""

    def _reply(self, asked: Asked, fault: str) -> None:
        special = {"close": self._close, "stall": self._stall, "dribble": self._dribble}
        if fault in special:
            special[fault]()
        elif fault == "redirect":
            self._send(307, "", {"Location": self.server.target})  # of all redirects, the one that repeats the body
        elif fault.isdecimal():
            said = json.dumps({"error": {"message": self.server.message}})
            self._send(int(fault), said, {"Retry-After": "0.3"} if fault == "429" else {})
        elif fault:
            self._send(200, BODIES.get(fault, fault))
        else:
            self.server.over.wait(self.server.slow)
            self._send(200, completion("Yes." if "sorry" in asked.answer else "No."))

    def _send(self, status: int, text: str, headers: dict[str, str] | None = None) -> None:
        data = text.encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def _close(self) -> None:
        self.close_connection = True

    def _stall(self) -> None:
        self.server.over.wait()
        self.close_connection = True

    def _dribble(self) -> None:
        """Send a good reply, but never to its end."""
        self.send_response(200)
        self.send_header("Content-Length", "1000000")
        self.end_headers()
        while not self.server.over.wait(BEAT):
            self.wfile.write(b" ")
