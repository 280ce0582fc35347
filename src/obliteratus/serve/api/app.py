"""The web application: OpenAI's paths, each request followed until it is answered or its client is gone."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from obliteratus.core.errors import UserError, unknown_name
from obliteratus.inference.answers import AnswerDecoder
from obliteratus.serve.api.answers import DONE, Completion, StoppedText, WholeText, to_event
from obliteratus.serve.api.errors import ApiError, from_ending
from obliteratus.serve.api.requests import ChatRequest, OrderMaker, Request, TextRequest, parse_request
from obliteratus.serve.listen import matches, names_loopback
from obliteratus.serve.worker import COMPLETE, Ending, ModelWorker, Order, QueueFullError, StoppingError, Ticket

log = logging.getLogger(__name__)
MAX_BODY = 8 << 20  # bytes: a million tokens of text are about half of it
BODY_SECONDS = 30.0  # to send a request's body
SEND_SECONDS = 30.0  # beyond the time limit of an answer, for a client that reads slowly


@dataclass
class Api:
    """What the paths share."""

    worker: ModelWorker
    maker: OrderMaker
    created: int
    """Unix time at which the server began."""
    renderer: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "renderer"))
    """Templates and tokenizers of long texts take a while, and are not made for several threads."""

    def __post_init__(self) -> None:
        self.decoder = AnswerDecoder.create(self.maker.subject)

    # ------------------------------------------------------------------------------------------- paths
    async def list_models(self, request: HttpRequest) -> Response:
        """Answer GET /v1/models."""
        names = [self.maker.name, *self.maker.plans]
        return JSONResponse({"object": "list", "data": [self._describe(name) for name in names]})

    async def show_model(self, request: HttpRequest) -> Response:
        """Answer GET /v1/models/NAME."""
        name, known = request.path_params["name"], [self.maker.name, *self.maker.plans]
        if name not in known:
            raise ApiError(404, unknown_name("model", name, known), "model_not_found", "model")
        return JSONResponse(self._describe(name))

    def _describe(self, name: str) -> dict[str, Any]:
        about = {"plan": name in self.maker.plans, "parent": self.maker.name if name in self.maker.plans else None}
        return {"id": name, "object": "model", "created": self.created, "owned_by": "obliteratus", **about}

    async def show_health(self, request: HttpRequest) -> Response:
        """Answer GET /health: how many requests wait and run, and how earlier ones ended."""
        return JSONResponse({"status": "ok", **self.worker.summarize()})

    async def complete_chat(self, request: HttpRequest) -> Response:
        """Answer POST /v1/chat/completions."""
        asked = parse_request(ChatRequest, await read_body(request, self.worker))
        order = await self._render(lambda: self.maker.read_chat(asked))
        return Reply(self, asked, order, Completion("chat", asked.model, order.setting, len(order.ids)))

    async def complete_text(self, request: HttpRequest) -> Response:
        """Answer POST /v1/completions."""
        asked = parse_request(TextRequest, await read_body(request, self.worker))
        order = await self._render(lambda: self.maker.read_text(asked))
        return Reply(self, asked, order, Completion("text", asked.model, order.setting, len(order.ids)))

    async def _render(self, make: Callable[[], Order]) -> Order:
        return await asyncio.get_running_loop().run_in_executor(self.renderer, make)


async def read_body(request: HttpRequest, worker: ModelWorker) -> bytes:
    """Return the body of a request. Raises ApiError for one that cannot be taken on, without reading it."""
    check_room(worker)
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "send content-type: application/json")  # other types any web page may send
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY:
                    raise ApiError(413, f"the request is larger than {MAX_BODY >> 20} MB; shorten it")
    except TimeoutError as error:
        raise ApiError(408, f"the request's body did not come within {BODY_SECONDS:g} seconds") from error
    return bytes(body)


def check_room(worker: ModelWorker) -> None:
    """Raise ApiError if the worker takes no request at this moment."""
    with _refused(worker):
        worker.check_room()


@contextlib.contextmanager
def _refused(worker: ModelWorker) -> Iterator[None]:
    try:
        yield
    except QueueFullError as error:
        most = f"{worker.limits.rows} answers at a time and {worker.limits.queue} requests that wait"
        message = f"the queue is full: this server takes on {most}; try again later"
        raise ApiError(429, message, "queue_full") from error
    except StoppingError as error:
        raise ApiError(503, "the server is stopping", "stopping") from error
    except UserError as error:
        raise ApiError(400, str(error), "out_of_memory") from error


# ---------------------------------------------------------------------------------------------- one answer
class Reply(Response):
    """The answer to one request, whole or as a stream. Its row is given up as soon as the client hangs up."""

    def __init__(self, api: Api, asked: Request, order: Order, completion: Completion) -> None:
        super().__init__()
        self.api, self.asked, self.order, self.completion = api, asked, order, completion
        self.events: asyncio.Queue[list[int] | Ending] = asyncio.Queue()
        self.tokens, self.complete = 0, False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer. Raises ApiError as long as nothing was sent."""
        ticket = self._submit()
        try:
            async with asyncio.timeout(self.api.worker.limits.seconds + SEND_SECONDS):
                await _until_hung_up(receive, self._answer(scope, receive, send))
        except TimeoutError:
            log.warning("a client did not read its answer in time")  # the connection is closed
        finally:
            self.api.worker.cancel(ticket, self.complete)

    def _submit(self) -> Ticket:
        loop = asyncio.get_running_loop()

        def listen(event: list[int] | Ending) -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed by a second Ctrl-C
                loop.call_soon_threadsafe(self.events.put_nowait, event)

        with _refused(self.api.worker):
            return self.api.worker.submit(self.order, listen)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.asked.stream:
            await self._stream(send)
            return
        whole = await self._collect()
        await JSONResponse(whole)(scope, receive, send)

    async def _collect(self) -> dict[str, Any]:
        decoder, stops = self.api.decoder, self.asked.stops
        text = StoppedText(decoder, stops) if stops else WholeText(decoder)
        pieces = [pair async for pair in self._read_pieces(text)]
        return self.completion.to_document("".join(piece for piece, _ in pieces), self.tokens, pieces[-1][1])

    async def _stream(self, send: Send) -> None:
        pieces = self._read_pieces(StoppedText(self.api.decoder, self.asked.stops))
        first = await anext(pieces)  # as long as nothing was written, a failure is a status and not an event
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await _send(send, self.completion.to_event("", first=True))
        try:
            await self._send_piece(send, *first)
            async for piece, finish in pieces:
                await self._send_piece(send, piece, finish)
            if self.asked.stream_options is not None and self.asked.stream_options.include_usage:
                await _send(send, self.completion.to_usage_event(self.tokens))
            await _send(send, DONE)
        except ApiError as error:
            await _send(send, to_event(error.to_dict()))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_piece(self, send: Send, piece: str, finish: str) -> None:
        if piece:
            await _send(send, self.completion.to_event(piece))
        if finish:
            await _send(send, self.completion.to_event("", finish))

    async def _read_pieces(self, text: StoppedText | WholeText) -> AsyncIterator[tuple[str, str]]:
        """Yield pieces of the answer, each with '', and the last with why the answer ended. Raises ApiError."""
        while True:
            event = await self.events.get()
            if isinstance(event, Ending):
                if event.reason not in COMPLETE:
                    raise from_ending(event)
                yield text.finish(), "stop" if text.stopped else event.reason
                return
            self.tokens += len(event)
            piece = text.push(event)
            if text.stopped:
                self.complete = True
                yield piece, "stop"
                return
            if piece:
                yield piece, ""


async def _send(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})


async def _until_hung_up(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Do the work, or drop it once the client is gone."""

    async def wait_for_end() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(wait_for_end())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


# ------------------------------------------------------------------------------------------ the application
def build_app(api: Api, key: str = "") -> ASGIApp:
    """Return the ASGI application. key: see `Gate`."""
    routes = [
        Route("/v1/models", api.list_models),
        Route("/v1/models/{name:path}", api.show_model),
        Route("/v1/chat/completions", api.complete_chat, methods=["POST"]),
        Route("/v1/completions", api.complete_text, methods=["POST"]),
        Route("/health", api.show_health),
    ]
    handlers: dict[Any, Any] = {ApiError: _answer_error, HTTPException: _answer_http_error, Exception: _answer_bug}
    return Gate(Starlette(routes=routes, exception_handlers=handlers), key)


@dataclass(frozen=True)
class Gate:
    """ASGI middleware that lets in who may come in."""

    app: ASGIApp
    key: str = ""
    """Needed as ``Authorization: Bearer KEY``. Empty: the server must be called by a loopback name."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        refusal = self._refuse(HttpRequest(scope)) if scope["type"] == "http" else None
        await (self.app if refusal is None else _make_response(refusal))(scope, receive, send)

    def _refuse(self, request: HttpRequest) -> ApiError | None:
        if not self.key:
            if names_loopback(request.headers.get("host", "")):
                return None
            return ApiError(403, "call this server as localhost or 127.0.0.1; other names need serve --api-key")
        scheme, _, offered = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and matches(offered.strip(), self.key):
            return None
        return ApiError(401, "the API key is missing or wrong: send Authorization: Bearer KEY", "invalid_api_key")


def _make_response(error: ApiError) -> Response:
    return JSONResponse(error.to_dict(), error.status, error.headers())


async def _answer_error(request: HttpRequest, error: ApiError) -> Response:
    return _make_response(error)


async def _answer_http_error(request: HttpRequest, error: HTTPException) -> Response:
    what = f"{request.method} {request.url.path[:100]}"
    if error.status_code == 405:
        return _make_response(ApiError(405, f"{what}: this path takes another method"))
    known = "/v1/chat/completions, /v1/completions, /v1/models and /health"
    return _make_response(ApiError(error.status_code, f"{what}: not here; this server has {known}"))


async def _answer_bug(request: HttpRequest, error: Exception) -> Response:
    message = f"{type(error).__name__}: this is a bug; the server's terminal shows more"
    return _make_response(ApiError(500, message, "bug"))
