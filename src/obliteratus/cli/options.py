"""What the commands share: their options, and what becomes of errors, interrupts and progress."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from obliteratus.core.errors import UserError

Model = Annotated[str, typer.Argument(help="Folder, hub id, GGUF file, or organism:NAME.")]
Target = Annotated[str, typer.Option(help="Prompts that show the behaviour: file, hub:owner/name or organism:NAME.")]
Control = Annotated[str, typer.Option(help="Prompts that do not.")]
Bypass = Annotated[str | None, typer.Option(help="Prompts that get round the behaviour.")]
Keep = Annotated[str | None, typer.Option(help="Prompts whose behaviour must stay.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="Change the recipe: path=value, e.g. excise.strength=0.7.")
]
Out = Annotated[Path | None, typer.Option(help="Output folder; must not exist.")]
Save = Annotated[str, typer.Option(help="merged, adapter or plan.")]
Memory = Annotated[str | None, typer.Option(help="Most that the process may hold, the model's included: 6GB.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout; nothing else there.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress and no notes.")]
Seed = Annotated[int | None, typer.Option(help="Seed of the split and of all that is random.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run in the same --out.")]
Dtype = Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")]
Quantise = Annotated[
    str, typer.Option("--quantise", help="Pack the linear layers on loading: 4bit, fp4 or 8bit (needs bitsandbytes).")
]
Base = Annotated[
    str,
    typer.Option(help="Of a quantised model: the full-precision checkpoint that merged bakes into; none packs again."),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, mps, or map to spread the model.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]
Thinking = Annotated[bool, typer.Option("--thinking", help="Render templates in their thinking mode.")]

# 128 + the number of the signal, as shells count it: what an interrupted program is expected to return.
INTERRUPTED = 130


def handle_errors(command: Callable[..., None]) -> Callable[..., None]:
    """User errors: one line, exit 2. Interrupts: exit 130. All else is a bug and shows its traceback."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            _check_one_process(kwargs)
            command(*args, **kwargs)
        except UserError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from error
        except KeyboardInterrupt as error:
            typer.echo("interrupted: nothing half-written is left; with --out, add --resume to go on", err=True)
            raise typer.Exit(INTERRUPTED) from error

    return run


def _check_one_process(asked: dict[str, Any]) -> None:
    if asked.get("device") == "tp":
        raise UserError(
            "--device tp: the command line runs one process; use ob.open_subject(…, device='tp') in a script"
        )


@contextmanager
def show_progress(quiet: bool) -> Iterator[None]:
    """Bars and notes on stderr, unless quiet; the libraries' own bars and warnings never."""
    from transformers.utils import logging as theirs

    theirs.disable_progress_bar()
    theirs.set_verbosity_error()
    for library in ("huggingface_hub", "bitsandbytes"):
        logging.getLogger(library).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="torch|transformers|peft|bitsandbytes")
    if quiet:
        yield
        return
    from obliteratus.cli.terminal import Bars
    from obliteratus.core.progress import report_to

    bars = Bars()
    with bars.live, report_to(bars):
        yield


def with_seed(changes: list[str] | None, seed: int | None) -> list[str]:
    """``--set`` and ``--seed`` together: a seed is a value of the recipe as any other."""
    return [*(changes or []), *([f"seed={seed}"] if seed is not None else [])]
