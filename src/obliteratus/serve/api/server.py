"""Start the server, and end it so that every request hears of it."""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from obliteratus.core.errors import UserError
from obliteratus.core.types import Plan, Subject
from obliteratus.serve.api.requests import Defaults, OrderMaker
from obliteratus.serve.conversation import name_model
from obliteratus.serve.listen import is_loopback
from obliteratus.serve.worker import ModelWorker, ServerLimits

SHORTEST_KEY = 16  # characters: 64 bits even as hexadecimal digits
ENDS_WITHIN = 5  # seconds after the grace, for the last bytes


def check_key(host: str, key: str) -> None:
    """Raise UserError for one that could be guessed, or where others can reach a server without."""
    if not key and not is_loopback(host):
        raise UserError(f"--host {host}: others can reach this address; give --api-key, which clients then must send")
    if key and (len(key) < SHORTEST_KEY or not key.isascii() or not key.isprintable() or " " in key):
        raise UserError(f"--api-key: give at least {SHORTEST_KEY} ASCII characters without spaces")


def check_libraries() -> None:
    """Raise UserError if what serves HTTP is not installed."""
    try:
        import starlette
        import uvicorn
    except ModuleNotFoundError as error:
        raise UserError(f"serve needs {error.name}; pip install 'obliteratus[serve]'") from error
    del starlette, uvicorn


def check_names(subject: Subject, plans: Mapping[str, Plan]) -> str:
    """Return the model's name. Raises UserError if a plan has it too."""
    name = name_model(subject)
    if name in plans:
        raise UserError(f"--plan {name}: the unedited model has this name; give the plan another, as NAME=FOLDER")
    return name


@dataclass(frozen=True)
class Settings:
    """How a server is reached, how much it takes on, and how it ends. Raises UserError for values that cannot be."""

    limits: ServerLimits = field(default_factory=ServerLimits)
    defaults: Defaults = field(default_factory=Defaults)
    host: str = "127.0.0.1"
    port: int = 0
    key: str = ""
    """Which clients must send. Without one, only those who call the server by a loopback name are answered."""
    grace: float = 10.0
    """Seconds that running answers have to end once the server is stopped."""

    def __post_init__(self) -> None:
        check_key(self.host, self.key)
        if not (math.isfinite(self.grace) and self.grace >= 0):
            raise UserError(f"--grace {self.grace:g}: give 0 or more seconds")


class ApiServer:
    """A model and its plans, served until a signal or `stop`."""

    def __init__(self, subject: Subject, plans: Mapping[str, Plan], settings: Settings | None = None) -> None:
        from obliteratus.serve.api.app import Api, build_app

        own = settings or Settings()
        self.worker = ModelWorker(subject, plans, own.limits)
        maker = OrderMaker(subject, check_names(subject, plans), tuple(plans), own.defaults)
        self.api = Api(self.worker, maker, int(time.time()))
        self.server = _make_server(build_app(self.api, own.key), self.worker, own.grace)

    def run(self, listening: socket.socket, announce: Callable[[], None] = lambda: None) -> dict[str, int]:
        """Serve on a bound socket. Return how many requests ended how (`worker.Reason`).

        SIGINT and SIGTERM end it in the main thread. announce: called once requests are heard.
        """
        self.server.announce = announce
        self.worker.start()
        try:
            with suppress(KeyboardInterrupt):  # uvicorn raises the signal again once its connections are closed
                self.server.run(sockets=[listening])
        finally:
            self.worker.stop(0.0)
            self.worker.join()
            self.api.renderer.shutdown()
        return dict(self.worker.counts)

    def stop(self) -> None:
        """Let `run` end. May be called from any thread, and returns at once."""
        self.server.should_exit = True


def _make_server(app: Any, worker: ModelWorker, grace: float) -> Any:
    import uvicorn

    class Server(uvicorn.Server):
        announce: Callable[[], None]

        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            self.announce()

        async def shutdown(self, sockets: Any = None) -> None:
            worker.stop(grace)
            await super().shutdown(sockets)

    options: dict[str, Any] = {"log_level": "warning", "lifespan": "off", "server_header": False, "access_log": False}
    options["timeout_graceful_shutdown"] = int(grace) + ENDS_WITHIN
    return Server(uvicorn.Config(app, **options))
