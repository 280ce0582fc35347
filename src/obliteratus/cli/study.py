"""The commands `load_study`, `report` and `study-from-yaml`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from obliteratus.cli.options import Device, Json, Quiet, Seed, Trust, show_progress, with_seed

if TYPE_CHECKING:
    from obliteratus.study.base import KnockoutResult
    from obliteratus.study.settings import Study

KNOWN = "quick, full, attention, layers, knowledge, pruning, embeddings, refusal, robustness"
Source = Annotated[str, typer.Argument(metavar="FILE|PRESET", help=f"A study file (TOML), or one of {KNOWN}.")]
Studied = Annotated[str, typer.Argument(metavar="MODEL", help="Folder, hub id, GGUF file, or organism:NAME.")]
Changes = Annotated[list[str] | None, typer.Option("--set", help="Change the study: path=value, e.g. data.samples=8.")]
Prompts = Annotated[
    str | None,
    typer.Option(help="Prompts, for refusal and KL: file, hub:owner/name, organism:NAME; an organism has its own."),
]
Folder = Annotated[Path | None, typer.Option(help="Folder for results, tables and the page; by default the study's.")]
Resumed = Annotated[bool, typer.Option("--resume", help="Go on with the study whose results lie in --out.")]
Workers = Annotated[int, typer.Option(min=1, help="Processes, each with its own copy of the model.")]
Ray = Annotated[str, typer.Option(help="Run the workers by Ray: local, or a cluster's address.")]
Typed = Annotated[str | None, typer.Option(help="auto (as stored), float32, bfloat16 or float16; else the study's.")]
Top = Annotated[int, typer.Option(min=1, help="Parts in the terminal's table, those that count most.")]
By = Annotated[str, typer.Option(help="The metric that orders the tables; by default the study's first.")]
TOP = 20  # fits a screen
WIDTH = 26  # characters of a column that holds a change with its interval, or a part's name


def study(
    source: Source,
    model: Studied = "",
    target: Prompts = None,
    control: Prompts = None,
    out: Folder = None,
    set_: Changes = None,
    seed: Seed = None,
    resume: Resumed = False,
    workers: Workers = 1,
    ray: Ray = "",
    top: Top = TOP,
    dtype: Typed = None,
    device: Device = "auto",
    trust_remote_code: Trust = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Knock out parts of a model one at a time, live, and measure what breaks: tables, plots, one page."""
    from obliteratus.study.output import write
    from obliteratus.study.run import run_study

    changes = {"model": model or None, "data.target": target, "data.control": control, "dtype": dtype}
    made = _checked(source, with_seed(set_, seed), changes)
    kept = _place(made, out, resume)
    opening = {"dtype": made.dtype, "device": device, "trust_remote_code": trust_remote_code}
    title = f"Study {made.name} of {made.model}"
    with show_progress(quiet), _folder(kept) as folder:
        results = run_study(made, opening, folder, resume=resume, workers=workers, ray=ray)
        if kept is not None:
            write(results, folder, title)
    _show_one(results, title, kept, top, json)


def report(
    folders: Annotated[list[Path], typer.Argument(metavar="STUDY_DIR...", help="Output folders of studies.")],
    out: Annotated[Path | None, typer.Option(help="Folder for several studies side by side; must not exist.")] = None,
    by: By = "",
    top: Top = TOP,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make the tables and the page of a study again from its results, finished or not; of several, side by side."""
    from obliteratus.core.run_folder import check_free
    from obliteratus.study.output import check_metric, read, title_of, write, write_beside

    studies = {name: read(folder) for name, folder in _named(folders).items()}
    check_metric(studies, by)
    if out is not None:
        check_free(out)
    if len(studies) == 1 and out is None:
        results, folder = next(iter(studies.values())), folders[0]
        title = title_of(folder)
        with show_progress(quiet):
            write(results, folder, title, by)
        _show_one(results, title, folder, top, json, by)
        return
    if out is not None:
        with show_progress(quiet):
            write_beside(studies, out, "Studies side by side")
    _show_all(studies, out, top, json, by)


def study_from_yaml(
    source: Annotated[Path, typer.Argument(metavar="FILE.yaml", help="A study of the earlier program.")],
    out: Annotated[
        Path | None, typer.Option(help="The study file to write; must not exist. By default stdout.")
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Turn a study of the earlier program, YAML, into a study file; what has no counterpart is named."""
    from obliteratus.cli.terminal import notes as told
    from obliteratus.cli.terminal import results, show_json
    from obliteratus.core.errors import UserError
    from obliteratus.core.run_folder import write_atomic
    from obliteratus.study.convert import as_toml, convert

    made, left = convert(source)
    if out is not None and (out.exists() or out.suffix != ".toml" or not out.parent.is_dir()):
        raise UserError(f"{out}: give --out a .toml file that does not exist yet, in a folder that does")
    text = as_toml(made, left, source)
    if out is not None:
        write_atomic(out, text)
    for note in [] if quiet else left:
        told.print(f"not as it was: {note}", markup=False, soft_wrap=True)
    if json:
        show_json({"study": made.model_dump(mode="json", exclude_defaults=True), "notes": left})
    elif out is None:
        results.out(text, end="")


# ------------------------------------------------------------------------------------------- checking
def _checked(source: str, pairs: Sequence[str], changes: Mapping[str, Any]) -> Study:
    """The study with everything that the command line says, checked as far as it can be without the model."""
    from obliteratus.core.errors import UserError
    from obliteratus.pipeline.recipe import parse_overrides
    from obliteratus.study.data import check_study
    from obliteratus.study.files import load_study as read_study
    from obliteratus.study.files import with_own_prompts
    from obliteratus.summon.load import parse_dtype

    given = {path: value for path, value in changes.items() if value is not None}
    made = with_own_prompts(read_study(source, parse_overrides(list(pairs)) | given))
    if not made.model:
        raise UserError(f"study '{source}': it names no model; give one: obliteratus study {source} MODEL")
    parse_dtype(made.dtype)
    check_study(made)
    return made


def _place(made: Study, out: Path | None, resume: bool) -> Path | None:
    """Where the study is kept; None for nowhere. UserError for a folder in use that is not to be resumed."""
    from obliteratus.core.errors import UserError
    from obliteratus.core.run_folder import check_free

    kept = out or (Path(made.output) if made.output else None)
    if resume and kept is None:
        raise UserError("--resume: there is no study's folder to resume; give --out FOLDER")
    if kept is not None and not resume:
        check_free(kept)
    return kept


@contextmanager
def _folder(kept: Path | None) -> Iterator[Path]:
    """The study's folder, or one that is gone afterwards."""
    if kept is not None:
        kept.mkdir(parents=True, exist_ok=True)
        try:
            yield kept
        finally:
            if not any(kept.iterdir()):  # refused before anything was measured
                kept.rmdir()
        return
    with TemporaryDirectory(prefix="obliteratus-study-") as folder:
        yield Path(folder)


def _named(folders: Sequence[Path]) -> dict[str, Path]:
    """Folders by their last names; by their whole paths where two are called alike. UserError for one named twice."""
    from obliteratus.core.errors import UserError

    whole = [folder.resolve() for folder in folders]
    for folder, place in zip(folders, whole, strict=True):
        if whole.count(place) > 1:
            raise UserError(f"{folder}: the study is named twice; name each once")
    short = [place.name for place in whole]
    return {n if short.count(n) == 1 else str(w): f for n, w, f in zip(short, whole, folders, strict=True)}


# -------------------------------------------------------------------------------------------- showing
def _show_one(
    results: Sequence[KnockoutResult], title: str, kept: Path | None, top: int, json: bool, by: str = ""
) -> None:
    from obliteratus.cli.terminal import make_table, show_json
    from obliteratus.cli.terminal import results as screen
    from obliteratus.study.ranking import knocked
    from obliteratus.study.tables import as_json, ordered_metrics, table, told

    if json:
        show_json(as_json(results, by))
        return
    fit = max(1, screen.width // WIDTH - 1)
    screen.print(make_table(f"{title}: changes, 95 % intervals", *table(results, top, by, fit)))
    for metric in ordered_metrics(results, by):  # those that the table has no room for, too
        screen.print(f"{metric}: {told(results, metric)}.", markup=False, soft_wrap=True)
    parts = sum(not r.control for r in knocked(results))
    if parts > top:
        screen.print(f"The {top} of {parts} parts that count most are shown; --top N shows more.", markup=False)
    _say_where(kept)


def _show_all(studies: Mapping[str, Sequence[KnockoutResult]], out: Path | None, top: int, json: bool, by: str) -> None:
    from obliteratus.cli.terminal import make_table, show_json
    from obliteratus.cli.terminal import results as screen
    from obliteratus.study.tables import as_json, beside, headed, shared_metrics

    if json:
        show_json({name: as_json(results, by) for name, results in studies.items()})
        return
    for metric in [by] if by else shared_metrics(studies):
        screen.print(make_table(f"{headed(metric)}: changes, 95 % intervals", *beside(studies, metric, top)))
    _say_where(out)


def _say_where(kept: Path | None) -> None:
    from rich.markup import escape

    from obliteratus.cli.terminal import results as screen

    place = f"[bold]Saved[/]  {escape(str(kept))}/index.html" if kept else "Nothing saved: give --out FOLDER."
    screen.print(place, soft_wrap=True)
