"""The ui command: the workbench in a browser."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from obliteratus.cli.options import Device, Dtype
from obliteratus.core.errors import UserError

if TYPE_CHECKING:
    from obliteratus.cli.jobs import Job
    from obliteratus.serve.ui.requests import RunRequest
    from obliteratus.serve.ui.workbench import RunMethod


def ui(
    models: Annotated[
        list[str] | None, typer.Argument(help="Models to offer beside organisms and those of the workspace.")
    ] = None,
    workspace: Annotated[
        Path, typer.Option(help="Folder for runs, exports and uploads. The browser reaches no other.")
    ] = Path("obliteratus-ui"),
    host: Annotated[str, typer.Option(help="Address to listen on. Any but this machine's own needs a token.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 7860,
    token: Annotated[
        str,
        typer.Option(envvar="OBLITERATUS_UI_TOKEN", help="Secret that browsers need. Default: made if needed."),
    ] = "",
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Open a workbench in the browser: run a method, read the result, talk to both models, save."""
    from obliteratus.serve.ui.app import serve
    from obliteratus.serve.ui.workbench import Workbench
    from obliteratus.serve.ui.workspace import Workspace

    opening = {"dtype": dtype, "device": device}
    bench = Workbench(Workspace.create(workspace), make_runner(opening), name_models(models or []), opening)
    serve(bench, host, port, token, announce)


def name_models(sources: list[str]) -> dict[str, str]:
    """Return sources of models by what the page calls them: a folder or file by its name alone.

    Raises UserError if two have one name, or a source is nothing that can be opened.
    """
    from obliteratus.weights.sources import locate

    named: dict[str, str] = {}
    for source in sources:
        local = not source.startswith("organism:") and locate(source).local
        name = Path(source).expanduser().resolve().name if local else source
        if name in named:
            raise UserError(f"{source}: another model is called {name} too; give one of them another name")
        named[name] = str(Path(source).expanduser().resolve()) if local else source
    return named


def announce(address: str) -> None:
    """Print the address to open."""
    typer.echo(f"Open {address} in a browser. Ctrl-C ends the program.")


def make_runner(opening: dict[str, str]) -> RunMethod:
    """Return what runs a request. opening: arguments of `open_subject`, which never include trust in remote code."""
    from obliteratus.cli.jobs import run_job
    from obliteratus.core.clock import Clock

    def run(request: RunRequest, out: Path, resume: bool, only_check: bool) -> None:
        job = make_job(request, out)
        if not only_check:
            run_job(job, {**opening}, Clock(), resume)

    return run


def make_job(request: RunRequest, out: Path) -> Job:
    """Return the job of a request. Raises UserError for anything in it that cannot work."""
    from obliteratus.cli.jobs import Job

    job = Job.create(
        request.model, request.method, request.overrides(), request.sources(), out, request.form, force=request.force
    )
    return job.with_search(request.trials) if request.trials else job
