"""Run a study from start to end: results are written as they come, and an interrupted study can be resumed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TextIO

from pydantic import ValidationError

from obliteratus.core.errors import UserError
from obliteratus.core.progress import progress
from obliteratus.core.run_folder import check_identity, lock_folder, write_atomic
from obliteratus.core.toml import dump_toml
from obliteratus.core.types import Subject
from obliteratus.study.base import KnockoutResult
from obliteratus.study.data import check_study
from obliteratus.study.settings import Study
from obliteratus.study.workers import Executor, Local, Processes, Ray
from obliteratus.summon.fingerprint import fingerprint_files
from obliteratus.verify.answers import FILE as ANSWERS

RESULTS = "results.jsonl"


def measure_study(
    study: Study,
    opening: Mapping[str, Any],
    folder: Path,
    *,
    resume: bool = False,
    workers: int = 1,
    ray: str = "",
    subject: Subject | None = None,
) -> tuple[KnockoutResult, ...]:
    """Knock out every part that the study names, one at a time, measure, and return the baseline and all results.

    opening: options of `open_subject`, with which ``study.model`` is opened. folder: results are appended to its
    ``results.jsonl``, a few parts at a time; with ``resume`` those found there are not measured again. workers: number
    of processes, each with its own copy of the model and its share of the cores. ray: ``local``, or the address of the
    Ray cluster on which the workers run. subject: the model, if it is in memory; then it is not opened.

    Raises UserError for what cannot work, before anything is measured.
    """
    check_study(study)
    folder.mkdir(parents=True, exist_ok=True)
    with lock_folder(folder):
        check_identity(folder / "identity.json", study_identity(study) | _identify_model(study, subject))
        (folder / "study.toml").write_text(dump_toml(study), encoding="utf-8")
        done = _load_finished(folder / RESULTS, resume)
        with closing(_create_executor(study, opening, workers, ray, subject)) as executor:
            _drop_unfinished(folder / ANSWERS, done)
            try:
                return (*done, *_measure_rest(folder / RESULTS, executor, done))
            except KeyboardInterrupt as error:
                raise KeyboardInterrupt(f"; the finished parts are kept in {folder}, for --resume") from error


@contextmanager
def open_folder(folder: Path | None) -> Iterator[Path]:
    """Yield the study's folder, or a temporary one. A folder in which nothing was written is removed."""
    if folder is None:
        with TemporaryDirectory(prefix="obliteratus-study-") as temporary:
            yield Path(temporary)
        return
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    finally:
        if not any(folder.iterdir()):  # the study was refused before anything was measured
            folder.rmdir()


def study_identity(study: Study) -> dict[str, Any]:
    """Return what must be equal for a study to be resumed: all but its name, description and output folder."""
    return study.model_dump(mode="json", exclude={"name", "about", "output"})


def _identify_model(study: Study, subject: Subject | None) -> dict[str, str]:
    return fingerprint_files(study.model) if subject is None else {"weights": subject.source.digest}


def _create_executor(
    study: Study, opening: Mapping[str, Any], workers: int, ray: str, subject: Subject | None
) -> Executor:
    if subject is not None:
        return Local(study, opening, subject)
    if ray:
        return Ray(study, opening, workers, ray)
    return Processes(study, opening, workers) if workers > 1 else Local(study, opening)


def _measure_rest(path: Path, executor: Executor, done: Sequence[KnockoutResult]) -> Iterator[KnockoutResult]:
    """Yield what is not done yet; each result is in the file before it is yielded."""
    names = {result.component for result in done}
    batches = executor.batches()
    with path.open("a", encoding="utf-8") as file, progress("STUDY parts", sum(map(len, batches))) as advance:
        advance(max(0, len(names) - 1))
        if not done:
            yield from _append(file, [executor.measure_baseline()])
        rest = [[name for name in batch if name not in names] for batch in batches]
        for results in executor.measure_batches([batch for batch in rest if batch]):
            yield from _append(file, results)
            advance(len(results))


def _append(file: TextIO, results: Sequence[KnockoutResult]) -> Sequence[KnockoutResult]:
    """Append results, and to the file of answers beside it those that were judged."""
    with Path(file.name).with_name(ANSWERS).open("a", encoding="utf-8") as answers:
        for result in results:
            lines = ({"component": result.component, **line} for line in result.answers)
            answers.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    file.write("".join(result.model_dump_json() + "\n" for result in results))
    file.flush()
    return results


def _drop_unfinished(path: Path, done: Sequence[KnockoutResult]) -> None:
    """Drop answers of parts whose results were not written before the study was interrupted."""
    if path.is_file():
        names = {result.component for result in done}
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
        write_atomic(path, "".join(line + "\n" for line in lines if json.loads(line)["component"] in names))


def _load_finished(path: Path, resume: bool) -> list[KnockoutResult]:
    """Return the results of an interrupted study, and remove a half-written last line from the file."""
    if not path.is_file():
        return []
    if not resume:
        raise UserError(f"{path}: this folder holds a study; add --resume to continue it, or name another folder")
    # A complete line ends in a line feed, so the last one is empty or incomplete.
    lines = path.read_text(encoding="utf-8").split("\n")
    write_atomic(path, "".join(line + "\n" for line in lines[:-1]))
    return [_parse_result(line, f"{path}:{n}") for n, line in enumerate(lines[:-1], 1)]


def _parse_result(line: str, where: str) -> KnockoutResult:
    try:
        return KnockoutResult.model_validate(json.loads(line))
    except (json.JSONDecodeError, ValidationError) as error:
        raise UserError(f"{where}: not a study result; the file was changed, start the study anew") from error
