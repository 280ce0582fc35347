"""The API server on a tiny model, in a thread, and OpenAI's own client for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import openai

from obliteratus.core.types import Plan, Subject
from obliteratus.serve.api.server import ApiServer, Settings
from obliteratus.serve.listen import open_socket
from obliteratus.serve.worker import ModelWorker

# Seconds to wait for what takes a few milliseconds. A machine that does much else is no reason to fail.
PATIENCE = 240


@dataclass(frozen=True)
class Served:
    """A server that answers."""

    url: str
    server: ApiServer

    @property
    def worker(self) -> ModelWorker:
        return self.server.worker

    def client(self, **options: Any) -> openai.OpenAI:
        """OpenAI's client, which asks only once and waits patiently."""
        return openai.OpenAI(
            base_url=f"{self.url}/v1", **{"api_key": "none", "max_retries": 0, "timeout": PATIENCE} | options
        )

    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE)


@contextmanager
def serving(subject: Subject, plans: Mapping[str, Plan], **options: Any) -> Iterator[Served]:
    """Serve inside the block. options: of `Settings`."""
    server, ready = ApiServer(subject, plans, Settings(**options)), threading.Event()
    with open_socket("127.0.0.1", 0) as listening:
        thread = threading.Thread(target=server.run, args=(listening, ready.set), name="server")
        thread.start()
        assert ready.wait(PATIENCE)
        try:
            yield Served(f"http://127.0.0.1:{listening.getsockname()[1]}", server)
        finally:
            server.stop()
            thread.join(PATIENCE)
    assert not thread.is_alive()


def wait_until(is_so: Callable[[], bool], seconds: float = PATIENCE) -> None:
    """Wait until something is so. Fails if it is not after so many seconds."""
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)
