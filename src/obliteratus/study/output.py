"""A study's folder: reading its results, finished or not, and writing tables, plots and a page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from pydantic import ValidationError

from obliteratus.core.errors import UserError, unknown_name
from obliteratus.core.run_folder import check_free, require_file, write_atomic
from obliteratus.study.base import KnockoutResult
from obliteratus.study.files import load_study
from obliteratus.study.page import comparison_page, draw_pictures, study_page
from obliteratus.study.plots import comparison_picture, study_pictures
from obliteratus.study.ranking import metric_names
from obliteratus.study.tables import (
    changes_table,
    comparison_table,
    ordered_metrics,
    shared_metrics,
    to_csv,
    to_json,
    to_latex,
    to_markdown,
)
from obliteratus.verify.answers import FILE as ANSWERS
from obliteratus.verify.answers import read_lines

RESULTS, SETTINGS = "results.jsonl", "study.toml"
PRINTED_ROWS = 40  # the parts that fit on a printed page; table.md and results.csv hold all


# --------------------------------------------------------------------------------------------- reading
def load_results(folder: Path) -> tuple[KnockoutResult, ...]:
    """Load the baseline and all knockouts that were measured so far.

    An incomplete last line, which a kill leaves, is skipped. Raises UserError with the line's number if any other line
    is not a result or a part comes twice, and if there is no baseline yet.
    """
    path = require_file(folder, RESULTS, "the output folder of a study")
    *complete, last = path.read_bytes().split(b"\n")
    results = [_parse_result(line, f"{path}:{number}") for number, line in enumerate(complete, 1)]
    if last:
        with suppress(ValidationError):
            results.append(KnockoutResult.model_validate_json(last))  # only its line feed is missing
    if not results:
        raise UserError(f"{path}: holds no result yet; continue the study: obliteratus study … --resume")
    _check_order(results, path)
    return tuple(results)


def _parse_result(line: bytes, where: str) -> KnockoutResult:
    try:
        return KnockoutResult.model_validate_json(line)
    except ValidationError as error:
        first = error.errors()[0]
        reason = ": ".join([*(str(x) for x in first["loc"]), first["msg"]])  # without the line, which may be long
        raise UserError(f"{where}: not a study's result ({reason}); remove the line") from error


def _check_order(results: Sequence[KnockoutResult], path: Path) -> None:
    seen: set[str] = set()
    for number, result in enumerate(results, 1):
        if bool(result.strategy) == (number == 1):
            raise UserError(f"{path}:{number}: the baseline must be the first line and come once; correct the file")
        if result.component in seen:
            raise UserError(f"{path}:{number}: '{result.component}' comes twice; remove one of the lines")
        seen.add(result.component)


def study_title(folder: Path) -> str:
    """Return the title of the study in a folder: its name and model, or the folder's name."""
    if not (folder / SETTINGS).is_file():
        return f"Study {folder.resolve().name}"
    study = load_study(folder / SETTINGS)
    return f"Study {study.name} of {study.model}"


def describe_different_data(folders: Mapping[str, Path]) -> str:
    """Return in what the data of several studies differ, or '' if all were measured on the same texts and prompts."""
    known = {name: load_study(path / SETTINGS) for name, path in folders.items() if (path / SETTINGS).is_file()}
    made = [
        {**study.data.model_dump(), "seed": study.seed, "split_by": study.split_by, "judge": study.judge.model_dump()}
        for study in known.values()
    ]
    differing = [key for key in (made[0] if made else {}) if any(one[key] != made[0][key] for one in made)]
    if not differing:
        return ""
    return f"The studies differ in {', '.join(differing)}: their changes are of different texts, prompts or verdicts."


def check_metric(studies: Mapping[str, Sequence[KnockoutResult]], by: str) -> None:
    """Raise UserError if one of the studies does not have the metric."""
    for name, results in studies.items():
        if by and by not in metric_names(results):
            raise UserError(f"study '{name}': {unknown_name('metric', by, metric_names(results))}")


# --------------------------------------------------------------------------------------------- writing
def write_report(results: Sequence[KnockoutResult], folder: Path, title: str, by: str = "") -> None:
    """Write results.csv, results.json, table.md, table.tex, plots/*.svg and index.html, each completely or not at all.

    by: the metric that orders them, by default the study's first. Raises UserError for one that was not measured.
    """
    pictures = {name: draw_pictures(study_pictures(results, name), name) for name in ordered_metrics(results, by)}
    settings = folder / SETTINGS
    _write_plots(pictures, folder)
    texts = {
        "results.csv": to_csv(results, by),
        "results.json": json.dumps(to_json(results, by), indent=1, ensure_ascii=False, allow_nan=False),
        "table.md": to_markdown(changes_table(results, by=by)),
        "table.tex": to_latex(changes_table(results, PRINTED_ROWS, by), title),
        "index.html": study_page(
            results,
            title,
            pictures,
            by,
            settings.read_text(encoding="utf-8") if settings.is_file() else "",
            read_lines(folder / ANSWERS),
        ),
    }
    for name, text in texts.items():
        write_atomic(folder / name, text)


def write_comparison(studies: Mapping[str, Sequence[KnockoutResult]], folder: Path, title: str) -> None:
    """Write several studies side by side: METRIC.md and METRIC.tex, results.json, plots/*.svg and index.html.

    Raises UserError if the folder is in use.
    """
    check_free(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = shared_metrics(studies)
    pictures = {name: draw_pictures({"beside": comparison_picture(studies, name)}, name) for name in names}
    _write_plots(pictures, folder)
    for name in names:
        write_atomic(folder / f"{name}.md", to_markdown(comparison_table(studies, name)))
        table = comparison_table(studies, name, PRINTED_ROWS)
        write_atomic(folder / f"{name}.tex", to_latex(table, f"{title}: {name}"))
    data = {study: to_json(results) for study, results in studies.items()}
    write_atomic(folder / "results.json", json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False))
    write_atomic(folder / "index.html", comparison_page(studies, title, pictures))


def _write_plots(pictures: Mapping[str, Mapping[str, str]], folder: Path) -> None:
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    for metric, svgs in pictures.items():
        for name, svg in svgs.items():
            write_atomic(folder / "plots" / f"{metric}-{name}.svg", svg)
