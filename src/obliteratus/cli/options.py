"""Define what the commands share: options, and the handling of errors, interrupts and progress."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, cast, get_args

import typer

from obliteratus.core.chat import ChatFormat
from obliteratus.core.clock import Clock
from obliteratus.core.errors import UserError
from obliteratus.core.noise import hush_libraries
from obliteratus.core.plugins import load_plugin
from obliteratus.core.progress import Reporter, report_to
from obliteratus.core.separation import SplitBy as SplitByName

Model = Annotated[
    str, typer.Argument(help="Model folder, hub id, GGUF file, or organism:NAME (such as organism:astronomy).")
]
Served = Annotated[
    str, typer.Argument(help="Model, as for run; or the output folder of a run: a model, an adapter or a plan.")
]
Target = Annotated[
    str | None,
    typer.Option(
        help="Prompts that show the behavior: a file, hub:owner/name, organism:NAME or behavior:NAME. Default: the "
        "behavior's own examples, if it has any."
    ),
]
Control = Annotated[str | None, typer.Option(help="Prompts the model answers normally.")]
Behavior = Annotated[
    str | None, typer.Option(help="What to look for in answers: a behavior's name (default: refusal) or a .toml file.")
]
Phrases = Annotated[str | None, typer.Option(help="TOML file of further phrases that show the behavior, by language.")]
JudgedBy = Annotated[
    str | None,
    typer.Option(
        "--judge",
        help="Whose verdict counts: phrases (default), classifier, self (the model itself), endpoint, or the folder or "
        "hub id of a classifier or chat model.",
    ),
]
JudgeUrl = Annotated[
    str | None, typer.Option(help="OpenAI-compatible endpoint to ask about every answer. Answers leave this machine.")
]
NoOwnWords = Annotated[
    bool,
    typer.Option("--no-own-words", help="Count phrases alone, not openings that the model's target answers share."),
]
JudgeModel = Annotated[str | None, typer.Option(help="Model to ask for at --judge-url.")]
Bypass = Annotated[str | None, typer.Option(help="Target prompts rewritten so that the model answers them.")]
Keep = Annotated[str | None, typer.Option(help="Prompts for which the behavior must stay as it is.")]
Benign = Annotated[
    str | None,
    typer.Option(
        help="Harmless prompts that look like harmful ones, to measure false refusals on. Without --target they are "
        "what is edited."
    ),
]
Column = Annotated[
    list[str] | None,
    typer.Option(help="Column of the prompts in files and data sets, or GROUP=COLUMN. Default: the first usual name."),
]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="Change a value of the recipe: path=value, as in excise.strength=0.7.")
]
Plugin = Annotated[
    list[str] | None, typer.Option(help="Python file that registers steps of your own; repeat it for several.")
]
Out = Annotated[Path | None, typer.Option(help="Output folder. It must not exist yet.")]
Save = Annotated[
    str,
    typer.Option(
        help="What to save: merged, adapter, plan, gguf, lora-gguf or control-vector. Default: gguf if MODEL is a GGUF "
        "file, else merged.",
        show_default=False,
    ),
]
Memory = Annotated[str | None, typer.Option(help="Most memory that the process may use, such as 6GB.")]
Deterministic = Annotated[
    bool,
    typer.Option("--deterministic", help="Fix threads, batch sizes and kernels, so that the same bits come out again."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress and no notes.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show the messages of other libraries too.")]
Seed = Annotated[int | None, typer.Option(help="Seed of the prompt split and of everything random.")]
Force = Annotated[
    bool,
    typer.Option(
        "--force",
        help="Edit even if the model does not show the behavior, or prompts are few. Every output then says so.",
    ),
]
SplitBy = Annotated[
    str | None,
    typer.Option(help="Keep prompts in one part that share much wording (wording, the default) or their category."),
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the interrupted run in the same --out.")]
Dtype = Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")]
Quantize = Annotated[
    str, typer.Option(help="Quantize the linear layers on loading: 4bit, fp4 or 8bit. Needs bitsandbytes.")
]
Base = Annotated[
    str,
    typer.Option(help="Full-precision checkpoint to bake into if the model is quantized; none re-quantizes instead."),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, mps, or map to spread the model over devices.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")]
Thinking = Annotated[bool, typer.Option("--thinking", help="Render chat templates in their thinking mode.")]
Template = Annotated[str, typer.Option(help="Name of the chat template, if the model's tokenizer has several.")]


@contextmanager
def show_progress(quiet: bool, verbose: bool = False) -> Iterator[Clock]:
    """Show stages, bars and notes on stderr unless ``quiet``; the libraries' own messages only if ``verbose``.

    Yields the clock that measures the command's stages. The first is START, in which libraries are imported: import
    yours inside `start` too.
    """
    from obliteratus.cli.progress import make_reporter

    clock, reporter = Clock(), Reporter() if quiet else make_reporter()
    with reporter.live, report_to(reporter):
        if not verbose:
            with start(clock, goes_on=True):
                hush_libraries()
        yield clock


@contextmanager
def start(clock: Clock, goes_on: bool = False, plugins: Sequence[str] | None = None) -> Iterator[None]:
    """Measure the stage START, in which libraries are imported, and leave the garbage collector out of it.

    What imports make stays, so the collector would look it over again and again for a fifth of the time. plugins: files
    that are run first.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        with clock.time("START", goes_on):
            for file in plugins or ():
                load_plugin(file)
            yield
    finally:
        if collects:
            gc.enable()


def collect_opening(
    dtype: str, device: str, trust_remote_code: bool, quantize: str, thinking: bool, template: str
) -> dict[str, Any]:
    """Return how a model is to be opened, as `open_subject` takes it."""
    opening = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code, "quantize": quantize}
    return opening | {"chat": ChatFormat(thinking, template)}


def collect_sources(columns: list[str] | None, **groups: str | None) -> dict[str, Any]:
    """Return the sources of all groups, as `load_prompts` takes them. Raises UserError as `parse_columns` does."""
    return {**groups, "column": parse_columns(columns)}


def parse_columns(columns: list[str] | None) -> str | dict[str, str]:
    """Return the column of all groups, or of each. Raises UserError for a group that there is not, or two columns."""
    groups = ("target", "control", "bypass", "keep", "benign")
    if not columns:
        return ""
    pairs = [column.partition("=") for column in columns]
    if len(columns) == 1 and pairs[0][0] not in groups:
        return columns[0]
    for group, sign, name in pairs:
        if group not in groups or not name:
            raise UserError(f"--column {group}{sign}{name}: give one column, or GROUP=COLUMN for {', '.join(groups)}")
    return {group: name for group, _, name in pairs}


def split_names(text: str) -> tuple[str, ...]:
    """Return the names between commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def with_split(changes: list[str] | None, seed: int | None, split_by: str | None) -> list[str]:
    """Return the changes of ``--set`` with ``--seed`` and ``--split-by``, which are values of the recipe too."""
    values = {"seed": seed, "split_by": split_by}
    return [*(changes or []), *(f"{key}={json.dumps(value)}" for key, value in values.items() if value is not None)]


def check_split_by(split_by: str | None) -> SplitByName:
    """Return ``wording`` or ``category``. Raises UserError for anything else."""
    for name in get_args(SplitByName):
        if name == (split_by or "wording"):
            return cast(SplitByName, name)
    raise UserError(f"--split-by {split_by}: give {' or '.join(get_args(SplitByName))}")


def with_judge(
    changes: list[str],
    behavior: str | None,
    phrases: str | None,
    judge: str | None = None,
    url: str | None = None,
    model: str | None = None,
    no_own_words: bool = False,
) -> list[str]:
    """Return the changes of ``--set`` with those of the options about judging, which are values of the recipe too."""
    values: dict[str, Any] = {
        "behavior": behavior,
        "phrases": phrases,
        "decides": judge,
        "url": url,
        "url_model": model,
    }
    if no_own_words:
        values["own_words"] = False
    if judge and judge not in ("phrases", "classifier", "endpoint"):
        values["rungs"] = ["classifier", judge]
    return [*changes, *(f"judge.{key}={json.dumps(value)}" for key, value in values.items() if value is not None)]
