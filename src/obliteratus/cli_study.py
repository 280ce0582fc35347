"""The commands `study`, `report` and `study-from-yaml`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from obliteratus.options import Device, Json, Quiet, Seed, Trust, seeded, shown

if TYPE_CHECKING:
    from obliteratus.study.base import Result
    from obliteratus.study.settings import Study

Source = Annotated[str, typer.Argument(metavar="FILE|PRESET", help="A study file (TOML), or a preset's name.")]
Studied = Annotated[str, typer.Argument(metavar="MODEL", help="Folder, hub id, GGUF file, or organism:NAME.")]
Changes = Annotated[list[str] | None, typer.Option("--set", help="Change the study: path=value, e.g. data.samples=8.")]
Prompts = Annotated[str | None, typer.Option(help="Prompts, for refusal and KL: file, hub:owner/name, organism:NAME.")]
Folder = Annotated[Path | None, typer.Option(help="Folder for results, tables and the page; by default the study's.")]
Resumed = Annotated[bool, typer.Option("--resume", help="Go on with the study whose results lie in --out.")]
Workers = Annotated[int, typer.Option(min=1, help="Processes, each with its own copy of the model.")]
Top = Annotated[int, typer.Option(min=1, help="Parts in the terminal's table, those that count most.")]
By = Annotated[str, typer.Option(help="The metric that orders the tables; by default the study's first.")]
TOP = 20  # fits a screen


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
    top: Top = TOP,
    dtype: Annotated[str | None, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")] = None,
    device: Device = "auto",
    trust_remote_code: Trust = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Knock out parts of a model one at a time, live, and measure what breaks: tables, plots, one page."""
    from obliteratus.study.output import read, write
    from obliteratus.study.run import run_study
    from obliteratus.summon.open import open_subject

    changes = {"model": model or None, "data.target": target, "data.control": control, "dtype": dtype}
    made = _checked(source, seeded(set_, seed), changes)
    kept = _place(made, out, resume)
    with shown(quiet), _folder(kept) as folder:
        opening = {"dtype": made.dtype, "device": device, "trust_remote_code": trust_remote_code}
        run_study(made, open_subject(made.model, **opening), folder, resume=resume, workers=workers)
        results = read(folder)
        title = f"{made.name or 'Study'} of {made.model}"
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
    from obliteratus.study.output import check_metric, read, write, write_beside

    studies = {name: read(folder) for name, folder in _named(folders).items()}
    check_metric(studies, by)
    if out is not None:
        from obliteratus.store import check_free

        check_free(out)
    if len(studies) == 1 and out is None:
        (name, results), folder = next(iter(studies.items())), folders[0]
        write(results, folder, f"Study {name}", by)
        _show_one(results, f"Study {name}", folder, top, json, by)
        return
    if out is not None:
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
    from obliteratus.errors import UserError
    from obliteratus.study.convert import as_toml, convert
    from obliteratus.terminal import notes as told
    from obliteratus.terminal import results, show_json

    made, left = convert(source)
    if out is not None and (out.exists() or out.suffix != ".toml"):
        raise UserError(f"{out}: the study file must not exist yet and end in .toml; name another with --out")
    text = as_toml(made, left, source)
    if out is not None:
        out.write_text(text)
    for note in [] if quiet else left:
        told.print(f"not converted: {note}", markup=False, soft_wrap=True)
    if json:
        show_json({"study": made.model_dump(mode="json", exclude_defaults=True), "not_converted": left})
    elif out is None:
        results.out(text, end="")


# ------------------------------------------------------------------------------------------- checking
def _checked(source: str, pairs: Sequence[str], changes: Mapping[str, Any]) -> Study:
    """The study with everything that the command line says, checked as far as it can be without the model."""
    from obliteratus.errors import UserError
    from obliteratus.prompts import load_prompts, parts_checked
    from obliteratus.recipe import parse_overrides
    from obliteratus.study.files import check_ready
    from obliteratus.study.files import study as read_study
    from obliteratus.summon.open import dtype_of

    given = {path: value for path, value in changes.items() if value is not None}
    made = read_study(source, parse_overrides(list(pairs)) | given)
    if not made.model:
        raise UserError(f"study '{source}': it names no model; give one: obliteratus study {source} MODEL")
    dtype_of(made.dtype)
    check_ready(made)
    if made.data.target and made.data.control:
        parts_checked(load_prompts(made.data.target, made.data.control), made.seed)
    return made


def _place(made: Study, out: Path | None, resume: bool) -> Path | None:
    """Where the study is kept; None for nowhere. UserError for a folder in use that is not to be resumed."""
    from obliteratus.errors import UserError
    from obliteratus.store import check_free

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
        yield kept
        return
    with TemporaryDirectory(prefix="obliteratus-study-") as folder:
        yield Path(folder)


def _named(folders: Sequence[Path]) -> dict[str, Path]:
    """Folders by their last names; by their whole paths where two are called alike."""
    short = [folder.resolve().name for folder in folders]
    named = [n if short.count(n) == 1 else str(f) for n, f in zip(short, folders, strict=True)]
    return dict(zip(named, folders, strict=True))


# -------------------------------------------------------------------------------------------- showing
def _show_one(results: Sequence[Result], title: str, kept: Path | None, top: int, json: bool, by: str = "") -> None:
    from obliteratus.study.ranking import knocked
    from obliteratus.study.tables import as_json, table
    from obliteratus.terminal import results as screen
    from obliteratus.terminal import show_json, table_of

    if json:
        show_json(as_json(results))
        return
    screen.print(table_of(title, *table(results, top, by)))
    parts = sum(not r.control for r in knocked(results))
    if parts > top:
        screen.print(f"The {top} of {parts} parts that count most; --top N shows more.", markup=False)
    where = f"[bold]Saved[/]  {kept}/index.html" if kept else "Nothing saved: give --out FOLDER."
    screen.print(where, soft_wrap=True)


def _show_all(studies: Mapping[str, Sequence[Result]], out: Path | None, top: int, json: bool, by: str) -> None:
    from obliteratus.study.ranking import metrics
    from obliteratus.study.tables import as_json, beside
    from obliteratus.terminal import results as screen
    from obliteratus.terminal import show_json, table_of

    if json:
        show_json({name: as_json(results) for name, results in studies.items()})
        return
    shared = dict.fromkeys(m for results in studies.values() for m in metrics(results))
    for metric in [by] if by else shared:
        screen.print(table_of(metric, *beside(studies, metric, top)))
    screen.print(f"[bold]Saved[/]  {out}/index.html" if out else "Nothing saved: give --out FOLDER.", soft_wrap=True)
