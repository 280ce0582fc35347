"""The commands `study` and `report`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from obliteratus.cli.options import (
    Behavior,
    Device,
    Json,
    Phrases,
    Plugin,
    Quiet,
    Seed,
    SplitBy,
    Trust,
    Verbose,
    show_progress,
    start,
    with_judge,
    with_split,
)
from obliteratus.core.run_folder import check_free, require_file

if TYPE_CHECKING:
    from obliteratus.study.base import KnockoutResult
    from obliteratus.study.settings import Study

PRESETS = "quick, full, attention, layers, knowledge, pruning, embeddings, refusal, robustness"
Source = Annotated[str, typer.Argument(metavar="FILE|PRESET", help=f"A study file (TOML), or one of {PRESETS}.")]
StudyModel = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="Model folder, hub id, GGUF file or organism:NAME. Default: the study's."),
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Change a value of the study: path=value, as in data.samples=8.")
]
Target = Annotated[
    str | None,
    typer.Option(help="Prompts that show the behavior, for refusal and KL. The default are an organism's own."),
]
Control = Annotated[str | None, typer.Option(help="Prompts the model answers normally, for refusal and KL.")]
Out = Annotated[Path | None, typer.Option(help="Folder for results, tables and the page. Default: the study's.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the interrupted study in the same --out.")]
Workers = Annotated[int, typer.Option(min=1, help="Number of processes, each with its own copy of the model.")]
Ray = Annotated[str, typer.Option(help="Run the workers on Ray: local, or a cluster's address.")]
StudyDtype = Annotated[
    str | None, typer.Option(help="auto (as stored), float32, bfloat16 or float16. Default: the study's.")
]
FromYaml = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.yaml",
        help="Convert a YAML study of the earlier program to a study file, on stdout or in --out FILE.toml, and stop.",
    ),
]
Top = Annotated[int, typer.Option(min=1, help="Number of parts in the terminal's table, the most damaging first.")]
By = Annotated[str, typer.Option(help="Metric that orders the tables. The default is the study's first.")]
TOP = 20  # rows that fit on a screen
COLUMN_WIDTH = 26  # characters of a column that holds a change with its interval, or a part's name


def study(
    source: Source = "",
    model: StudyModel = "",
    target: Target = None,
    control: Control = None,
    behavior: Behavior = None,
    phrases: Phrases = None,
    out: Out = None,
    set_: Overrides = None,
    plugin: Plugin = None,
    seed: Seed = None,
    split_by: SplitBy = None,
    resume: Resume = False,
    workers: Workers = 1,
    ray: Ray = "",
    top: Top = TOP,
    from_yaml: FromYaml = None,
    dtype: StudyDtype = None,
    device: Device = "auto",
    trust_remote_code: Trust = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Knock out parts of a model one at a time and measure what breaks: tables, plots, one page."""
    from obliteratus.core.errors import UserError

    if from_yaml is not None:
        if source:
            raise UserError(f"--from-yaml converts {from_yaml} and runs no study; leave '{source}' out")
        _convert_yaml(from_yaml, out, json, quiet)
        return
    _check_source(source)
    changes = {"model": model or None, "data.target": target, "data.control": control, "dtype": dtype}
    with show_progress(quiet, verbose) as clock:
        with start(clock, plugins=plugin):
            from obliteratus.study.output import write_report
            from obliteratus.study.run import measure_study, open_folder

            loaded = _load_study(source, with_judge(with_split(set_, seed, split_by), behavior, phrases), changes)
            saved_to = _choose_folder(loaded, out, resume)
        opening = {"dtype": loaded.dtype, "device": device, "trust_remote_code": trust_remote_code}
        title = f"Study {loaded.name} of {loaded.model}"
        with open_folder(saved_to) as folder:
            with clock.time("STUDY"):
                results = measure_study(loaded, opening, folder, resume=resume, workers=workers, ray=ray)
            if saved_to is not None:
                with clock.time("REPORT"):
                    write_report(results, folder, title)
    _show_study(results, title, saved_to, top, json, times=clock.account())


def report(
    folders: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="Output folder of a run, or of one or more studies.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder for a page of several studies side by side. It must not exist yet.")
    ] = None,
    by: By = "",
    top: Top = TOP,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write the page of a run again, or the tables and page of a study, finished or not, or of several side by side."""
    if len(folders) == 1 and (folders[0] / "run.json").is_file():
        _report_run(folders[0], out, json)
        return
    for folder in folders:
        require_file(folder, "results.jsonl", "the output folder of a study")
    from obliteratus.cli.terminal import notes as stderr
    from obliteratus.study.output import (
        check_metric,
        describe_different_data,
        load_results,
        study_title,
        write_comparison,
        write_report,
    )

    named = _name_folders(folders)
    studies = {name: load_results(folder) for name, folder in named.items()}
    check_metric(studies, by)
    if out is not None:
        check_free(out)
    if len(studies) == 1 and out is None:
        results, folder = next(iter(studies.values())), folders[0]
        title = study_title(folder)
        with show_progress(quiet, verbose) as clock, clock.time("REPORT"):
            write_report(results, folder, title, by)
        _show_study(results, title, folder, top, json, by)
        return
    if out is not None:
        with show_progress(quiet, verbose) as clock, clock.time("REPORT"):
            write_comparison(studies, out, "Studies side by side")
    _show_comparison(studies, out, top, json, by)
    if different := describe_different_data(named):
        stderr.print(f"warning: {different}", markup=False, soft_wrap=True)


def _report_run(folder: Path, out: Path | None, json: bool) -> None:
    """Write the page of a run into its folder, and print where it is, or the record."""
    from obliteratus.cli.terminal import say, show_json
    from obliteratus.core.errors import UserError
    from obliteratus.rebirth.run_page import PAGE, read_run, write_run_page

    if out is not None:
        raise UserError(f"--out {out}: the page of a run belongs to its folder; leave --out out, or use compare")
    write_run_page(folder)
    if json:
        show_json(read_run(folder).model_dump(mode="json"))
    else:
        say(f"{folder}/{PAGE}", "Page")


def _convert_yaml(source: Path, out: Path | None, json: bool, quiet: bool) -> None:
    """Write the study file of a YAML study, and a note for each setting that is dropped or changed."""
    from obliteratus.cli.terminal import notes as stderr
    from obliteratus.cli.terminal import results, show_json
    from obliteratus.core.errors import UserError
    from obliteratus.core.run_folder import write_atomic
    from obliteratus.study.convert import convert_yaml, to_toml

    converted, notes = convert_yaml(source)
    if out is not None and (out.exists() or out.suffix != ".toml" or not out.parent.is_dir()):
        raise UserError(f"{out}: give --out a .toml file that does not exist yet, in a folder that does")
    text = to_toml(converted, notes, source)
    if out is not None:
        write_atomic(out, text)
    for note in [] if quiet else notes:
        stderr.print(f"differs: {note}", markup=False, soft_wrap=True)
    if json:
        show_json({"study": converted.model_dump(mode="json", exclude_defaults=True), "notes": notes})
    elif out is None:
        results.out(text, end="")


# ------------------------------------------------------------------------------------------- checking
def _check_source(source: str) -> None:
    """Raise UserError, before anything is imported, if no study is named, or there is none of that name."""
    from obliteratus.core.errors import UserError
    from obliteratus.pipeline.presets import STUDIES

    if not source:
        raise UserError(f"study: name a study file or one of {PRESETS}")
    if Path(source).suffix not in (".yaml", ".yml"):  # later it is said how to convert them
        STUDIES.read(source)


def _load_study(source: str, pairs: Sequence[str], changes: Mapping[str, Any]) -> Study:
    """Return the study with everything that the command line sets, checked as far as it can be without the model."""
    from obliteratus.core.errors import UserError
    from obliteratus.core.toml import parse_overrides
    from obliteratus.study.data import check_study
    from obliteratus.study.files import fill_prompts, load_study
    from obliteratus.summon.load import parse_dtype
    from obliteratus.verify.ladder import embed_files

    set_values = {path: value for path, value in changes.items() if value is not None}
    loaded = load_study(source, parse_overrides(list(pairs)) | set_values)
    loaded = fill_prompts(loaded.model_copy(update={"judge": embed_files(loaded.judge)}))
    if not loaded.model:
        raise UserError(f"study '{source}': it names no model; give one: obliteratus study {source} MODEL")
    parse_dtype(loaded.dtype)
    check_study(loaded)
    return loaded


def _choose_folder(loaded: Study, out: Path | None, resume: bool) -> Path | None:
    """Return where the study is saved, or None. Raises UserError if the folder is in use and not to be resumed."""
    from obliteratus.core.errors import UserError

    folder = out or (Path(loaded.output) if loaded.output else None)
    if resume and folder is None:
        raise UserError("--resume: there is no folder of a study to resume; give --out FOLDER")
    if folder is not None and not resume:
        check_free(folder)
    return folder


def _name_folders(folders: Sequence[Path]) -> dict[str, Path]:
    """Return folders by their names, or by their whole paths if two have the same name.

    Raises UserError for a folder that is given twice.
    """
    from obliteratus.core.errors import UserError

    paths = [folder.resolve() for folder in folders]
    for folder, path in zip(folders, paths, strict=True):
        if paths.count(path) > 1:
            raise UserError(f"{folder}: the study is named twice; name each once")
    names = [path.name for path in paths]
    return {n if names.count(n) == 1 else str(p): f for n, p, f in zip(names, paths, folders, strict=True)}


# -------------------------------------------------------------------------------------------- showing
def _show_study(
    results: Sequence[KnockoutResult],
    title: str,
    folder: Path | None,
    top: int,
    json: bool,
    by: str = "",
    times: dict[str, float] | None = None,
) -> None:
    from obliteratus.cli.stage_names import format_times
    from obliteratus.cli.terminal import results as screen
    from obliteratus.cli.terminal import say, show_json, show_table
    from obliteratus.study.ranking import knockout_results
    from obliteratus.study.tables import changes_table, ordered_metrics, summarize, to_json
    from obliteratus.verify.score_names import describe_score

    if json:
        show_json(to_json(results, by))
        return
    columns = max(1, screen.width // COLUMN_WIDTH - 1)
    heads, rows = changes_table(results, top, by, columns)
    show_table(f"{title}: changes, 95 % intervals", _name_metrics(heads, ordered_metrics(results, by)), rows)
    for metric in ordered_metrics(results, by):  # also those for which the table has no column
        say(f"{describe_score(metric)}: {summarize(results, metric)}.")
    parts = sum(not r.control for r in knockout_results(results))
    if parts > top:
        say(f"The {top} most damaging of {parts} parts are shown; --top N shows more.")
    if times:
        say(format_times(times), "Time")
    _show_folder(folder)


def _show_comparison(
    studies: Mapping[str, Sequence[KnockoutResult]], out: Path | None, top: int, json: bool, by: str
) -> None:
    from obliteratus.cli.terminal import show_json, show_table
    from obliteratus.study.tables import column_heading, comparison_table, shared_metrics, to_json

    if json:
        show_json({name: to_json(results, by) for name, results in studies.items()})
        return
    for metric in [by] if by else shared_metrics(studies):
        title = f"{_name_metrics([column_heading(metric)], [metric])[0]}: changes, 95 % intervals"
        show_table(title, *comparison_table(studies, metric, top))
    _show_folder(out)


def _name_metrics(headings: Sequence[str], metrics: Sequence[str]) -> list[str]:
    """Return headings with what people call the metrics in place of their keys."""
    from obliteratus.study.tables import column_heading
    from obliteratus.verify.score_names import describe_score

    words = {
        column_heading(metric): column_heading(metric).replace(metric, describe_score(metric)) for metric in metrics
    }
    return [words.get(heading, heading) for heading in headings]


def _show_folder(folder: Path | None) -> None:
    from obliteratus.cli.terminal import say

    if folder:
        say(f"{folder}/index.html", "Saved")
        say(f"open {folder}/index.html in a browser: all parts with their intervals and plots.", "Next")
    else:
        say("Nothing was saved. --out FOLDER keeps the page, the tables and the results.", "Next")
