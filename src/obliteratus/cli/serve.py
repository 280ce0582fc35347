"""Define the command `serve`: a model and its plans for OpenAI's clients."""

from __future__ import annotations

from typing import Annotated

import typer

from obliteratus.cli.options import (
    Device,
    Dtype,
    Json,
    Quantize,
    Quiet,
    Template,
    Thinking,
    Trust,
    Verbose,
    show_progress,
)
from obliteratus.core.chat import ChatFormat


def serve(
    model: Annotated[
        str, typer.Argument(help="Model, as for run; or the output folder of a run: a model, an adapter or a plan.")
    ],
    plan: Annotated[
        list[str] | None,
        typer.Option(help="Folder with a plan, or NAME=FOLDER. Clients name it as the model. Several may be given."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on. Any but this machine's own needs --api-key.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 8000,
    api_key: Annotated[
        str, typer.Option(envvar="OBLITERATUS_API_KEY", help="Secret that clients must send, as OpenAI's do.")
    ] = "",
    strength: Annotated[float, typer.Option(help="Of plans, for requests that give none: -1 to 2.")] = 1.0,
    tokens: Annotated[int, typer.Option(help="Most tokens of an answer, for requests that give no number.")] = 512,
    temperature: Annotated[float, typer.Option(help="For requests that give none; 0 takes the likeliest token.")] = 0.0,
    rows: Annotated[int, typer.Option(help="Most answers that are written side by side.")] = 64,
    queue: Annotated[int, typer.Option(help="Most requests that wait beyond these; others are refused.")] = 64,
    time_limit: Annotated[float, typer.Option(help="Most seconds from a request to the end of its answer.")] = 600.0,
    grace: Annotated[float, typer.Option(help="Seconds that answers have to end after Ctrl-C or SIGTERM.")] = 10.0,
    dtype: Dtype = "auto",
    quantize: Quantize = "",
    device: Device = "auto",
    trust_remote_code: Trust = False,
    thinking: Thinking = False,
    template: Template = "",
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Serve a model to OpenAI's clients, with plans as models of their own and the strength as a field."""
    from obliteratus.inference.stream import AnswerLimits
    from obliteratus.serve.api.requests import Defaults
    from obliteratus.serve.api.server import ApiServer, check_key, check_libraries, check_names
    from obliteratus.serve.dial import check_strength
    from obliteratus.serve.listen import open_socket
    from obliteratus.serve.open import open_to_serve
    from obliteratus.serve.worker import ServerLimits, check_grace

    check_libraries()
    limits = ServerLimits(rows, queue, time_limit)
    defaults = Defaults(AnswerLimits(tokens, temperature), check_strength(strength))
    check_grace(grace)
    listening = open_socket(host, port)
    opening = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code, "quantize": quantize}
    opening |= {"chat": ChatFormat(thinking, template)}
    with listening:
        check_key(host, api_key)
        with show_progress(quiet, verbose):
            subject, plans = open_to_serve(model, plan or [], opening)
        names = [check_names(subject, plans), *plans]
        place = f"[{host.strip('[]')}]" if ":" in host else host
        url = f"http://{place}:{listening.getsockname()[1]}/v1"
        server = ApiServer(subject, plans, limits, defaults, api_key, grace)
        counts = server.run(listening, lambda: announce(url, names, json, quiet))
    if not quiet:
        typer.echo(f"ended; {describe_counts(counts)}", err=True)


def announce(url: str, names: list[str], json: bool, quiet: bool) -> None:
    """Tell where the server is and what it serves, once it listens."""
    import sys

    from obliteratus.cli.terminal import show_json

    if json:
        show_json({"url": url, "models": names})
    elif not quiet:
        typer.echo(f"Serving at {url}: {', '.join(names)}. Ctrl-C ends the server.")
    sys.stdout.flush()


ENDINGS = {
    "stop": "ended by the model",
    "length": "cut at their length",
    "canceled": "given up by their client",
    "refused": "refused for want of room",
    "late": "over the time limit",
    "stopping": "told that the server stops",
    "failed": "failed",
    "memory": "failed for want of memory",
    "bug": "failed because of a bug",
}


def describe_counts(counts: dict[str, int]) -> str:
    """Return how many requests ended how, in words."""
    told = [f"{counts[name]} {words}" for name, words in ENDINGS.items() if counts.get(name)]
    return f"requests: {', '.join(told)}" if told else "no requests came"
