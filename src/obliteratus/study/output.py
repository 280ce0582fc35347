"""A study's folder: results read back, finished or not, and everything that is made of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError

from obliteratus.core.errors import UserError
from obliteratus.core.registry import unknown_name
from obliteratus.core.run_folder import check_free, write_atomic
from obliteratus.study.base import KnockoutResult
from obliteratus.study.files import load_study
from obliteratus.study.page import drawn, page, page_beside
from obliteratus.study.plots import beside_picture, pictures
from obliteratus.study.ranking import metrics
from obliteratus.study.tables import as_csv, as_json, beside, latex, markdown, ordered_metrics, shared_metrics, table

RESULTS, SETTINGS = "results.jsonl", "study.toml"
PRINTED = 40  # parts that a printed page has room for; table.md and results.csv hold all


# --------------------------------------------------------------------------------------------- reading
def read(folder: Path) -> tuple[KnockoutResult, ...]:
    """The baseline, then what has been knocked out so far.

    A last line without its end, which a kill leaves, is left out. UserError with the line's number where any other
    is no result, where a part comes twice, and where there is no baseline yet.
    """
    path = folder / RESULTS
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the output folder of a study")
    *whole, torn = path.read_bytes().split(b"\n")
    found = [_parsed(line, f"{path}:{number}") for number, line in enumerate(whole, 1)]
    if torn and (last := _whole(torn)) is not None:
        found.append(last)
    if not found:
        raise UserError(f"{path}: holds no result yet; go on with the study: obliteratus study … --resume")
    _check_order(found, path)
    return tuple(found)


def _parsed(line: bytes, where: str) -> KnockoutResult:
    try:
        return KnockoutResult.model_validate_json(line)
    except ValidationError as error:
        first = error.errors()[0]
        what = ": ".join([*(str(x) for x in first["loc"]), first["msg"]])  # not the line, which may be long
        raise UserError(f"{where}: not a study's result ({what}); remove the line") from error


def _whole(line: bytes) -> KnockoutResult | None:
    """A line whose end is missing, if nothing else is."""
    try:
        return KnockoutResult.model_validate_json(line)
    except ValidationError:
        return None


def _check_order(found: Sequence[KnockoutResult], path: Path) -> None:
    seen: set[str] = set()
    for number, result in enumerate(found, 1):
        if bool(result.strategy) == (number == 1):
            raise UserError(f"{path}:{number}: the baseline must be the first line and come once; mend the file")
        if result.component in seen:
            raise UserError(f"{path}:{number}: '{result.component}' comes twice; remove one of the lines")
        seen.add(result.component)


def title_of(folder: Path) -> str:
    """What the study in a folder is called: its name and model, or the folder's name."""
    if not (folder / SETTINGS).is_file():
        return f"Study {folder.resolve().name}"
    made = load_study(folder / SETTINGS)
    return f"Study {made.name} of {made.model}"


def check_metric(studies: Mapping[str, Sequence[KnockoutResult]], by: str) -> None:
    """UserError where a metric is named that a study has not."""
    for name, results in studies.items():
        if by and by not in metrics(results):
            raise UserError(f"study '{name}': {unknown_name('metric', by, metrics(results))}")


# --------------------------------------------------------------------------------------------- writing
def write(results: Sequence[KnockoutResult], folder: Path, title: str, by: str = "") -> None:
    """results.csv, results.json, table.md, table.tex, plots/*.svg and index.html, each whole or not at all.

    by: the metric that orders them, by default the study's first. UserError for one that was not taken.
    """
    seen = {name: drawn(pictures(results, name), name) for name in ordered_metrics(results, by)}
    settings = folder / SETTINGS
    _plots(seen, folder)
    texts = {
        "results.csv": as_csv(results, by),
        "results.json": json.dumps(as_json(results, by), indent=1, ensure_ascii=False, allow_nan=False),
        "table.md": markdown(table(results, by=by)),
        "table.tex": latex(table(results, PRINTED, by), title),
        "index.html": page(results, title, seen, by, settings.read_text() if settings.is_file() else ""),
    }
    for name, text in texts.items():
        write_atomic(folder / name, text)


def write_beside(studies: Mapping[str, Sequence[KnockoutResult]], folder: Path, title: str) -> None:
    """Several studies side by side: METRIC.md and METRIC.tex, results.json, plots/*.svg and index.html.

    UserError where the folder is in use.
    """
    check_free(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = shared_metrics(studies)
    seen = {name: drawn({"beside": beside_picture(studies, name)}, name) for name in names}
    _plots(seen, folder)
    for name in names:
        write_atomic(folder / f"{name}.md", markdown(beside(studies, name)))
        write_atomic(folder / f"{name}.tex", latex(beside(studies, name, PRINTED), f"{title}: {name}"))
    whole = {study: as_json(results) for study, results in studies.items()}
    write_atomic(folder / "results.json", json.dumps(whole, indent=1, ensure_ascii=False, allow_nan=False))
    write_atomic(folder / "index.html", page_beside(studies, title, seen))


def _plots(seen: Mapping[str, Mapping[str, str]], folder: Path) -> None:
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    for metric, named in seen.items():
        for name, svg in named.items():
            write_atomic(folder / "plots" / f"{metric}-{name}.svg", svg)
