"""Start the server, and end it so that every request hears of it."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from obliteratus.core.errors import UserError
from obliteratus.core.types import Plan, Subject
from obliteratus.serve.api.requests import Defaults, OrderMaker
from obliteratus.serve.conversation import name_model
from obliteratus.serve.listen import is_loopback
from obliteratus.serve.worker import ModelWorker, ServerLimits

SHORTEST_KEY = 16  # characters: 64 bits even as hexadecimal digits
ENDS_WITHIN = 5  # seconds after the grace, for the last bytes


def check_key(host: str, key: str) -> str:
    """Return the key. Raises UserError for one that could be guessed, or where others can reach a server without."""
    if not key and not is_loopback(host):
        raise UserError(f"--host {host}: others can reach this address; give --api-key, which clients then must send")
    if key and (len(key) < SHORTEST_KEY or not key.isascii() or not key.isprintable() or " " in key):
        raise UserError(f"--api-key: give at least {SHORTEST_KEY} ASCII characters without spaces")
    return key


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


class ApiServer:
    """A model and its plans, served until a signal or `stop`."""

    def __init__(
        self,
        subject: Subject,
        plans: Mapping[str, Plan],
        limits: ServerLimits | None = None,
        defaults: Defaults | None = None,
        key: str = "",
        grace: float = 10.0,
    ) -> None:
        """key: that clients must send; without one only those who call the server by a loopback name are answered.
        grace: seconds that running answers have to end once the server is stopped."""
        from obliteratus.serve.api.app import Api, build_app

        self.worker = ModelWorker(subject, plans, limits or ServerLimits())
        maker = OrderMaker(subject, check_names(subject, plans), tuple(plans), defaults or Defaults())
        self.api = Api(self.worker, maker, int(time.time()))
        self.server = _make_server(build_app(self.api, key), self.worker, grace)

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
            self.worker.stop(0)
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
