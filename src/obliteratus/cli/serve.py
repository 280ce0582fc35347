"""Define the command `serve`: a model and its plans for OpenAI's clients."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from obliteratus.cli.options import (
    Device,
    Dtype,
    Json,
    Quantize,
    Quiet,
    Served,
    Template,
    Thinking,
    Trust,
    Verbose,
    collect_opening,
    show_progress,
)

if TYPE_CHECKING:
    from obliteratus.serve.api.server import Settings


Plans = Annotated[
    list[str] | None,
    typer.Option(help="Folder with a plan, or NAME=FOLDER. Clients name it as the model. Several may be given."),
]
Host = Annotated[str, typer.Option(help="Address to listen on. Any but this machine's own needs --api-key.")]
Port = Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")]
Key = Annotated[str, typer.Option(envvar="OBLITERATUS_API_KEY", help="Secret that clients must send, as OpenAI's do.")]
Strength = Annotated[float, typer.Option(help="Of plans, for requests that give none: -1 to 2.")]
Tokens = Annotated[int, typer.Option(help="Most tokens of an answer, for requests that give no number.")]
Temperature = Annotated[float, typer.Option(help="For requests that give none; 0 takes the likeliest token.")]
Rows = Annotated[int, typer.Option(help="Most answers that are written side by side.")]
Queue = Annotated[int, typer.Option(help="Most requests that wait beyond these; others are refused.")]
TimeLimit = Annotated[float, typer.Option(help="Most seconds from a request to the end of its answer.")]
Grace = Annotated[float, typer.Option(help="Seconds that answers have to end after Ctrl-C or SIGTERM.")]


def serve(
    model: Served,
    plan: Plans = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    api_key: Key = "",
    strength: Strength = 1.0,
    tokens: Tokens = 512,
    temperature: Temperature = 0.0,
    rows: Rows = 64,
    queue: Queue = 64,
    time_limit: TimeLimit = 600.0,
    grace: Grace = 10.0,
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
    from obliteratus.serve.api.server import Settings
    from obliteratus.serve.dial import check_strength
    from obliteratus.serve.worker import ServerLimits

    opening = collect_opening(dtype, device, trust_remote_code, quantize, thinking, template)
    defaults = Defaults(AnswerLimits(tokens, temperature), check_strength(strength))
    settings = Settings(ServerLimits(rows, queue, time_limit), defaults, host, port, api_key, grace)
    counts = open_and_serve(model, plan or [], opening, settings, Said(json, quiet, verbose))
    if not quiet:
        typer.echo(f"ended; {describe_counts(counts)}", err=True)


class Said(NamedTuple):
    """What the command prints."""

    json: bool
    quiet: bool
    verbose: bool


def open_and_serve(
    model: str, plan: list[str], opening: dict[str, Any], settings: Settings, said: Said
) -> dict[str, int]:
    """Serve until a signal comes, and return how many requests ended how. The address is taken before the model is
    loaded, so that one that cannot be had is told at once."""
    from obliteratus.serve.api.server import ApiServer, check_libraries, check_names
    from obliteratus.serve.listen import open_socket
    from obliteratus.serve.open import open_to_serve

    check_libraries()
    with open_socket(settings.host, settings.port) as listening:
        with show_progress(said.quiet, said.verbose):
            subject, plans = open_to_serve(model, plan, opening)
        names = [check_names(subject, plans), *plans]
        host = f"[{settings.host.strip('[]')}]" if ":" in settings.host else settings.host
        url = f"http://{host}:{listening.getsockname()[1]}/v1"
        return ApiServer(subject, plans, settings).run(listening, lambda: announce(url, names, said))


def announce(url: str, names: list[str], said: Said) -> None:
    """Tell where the server is and what it serves, once it listens."""
    from obliteratus.cli.terminal import show_json

    if said.json:
        show_json({"url": url, "models": names})
    elif not said.quiet:
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
