"""A study from beginning to end: results are written down as they come, and an interrupted study goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from obliteratus.core.errors import UserError
from obliteratus.core.progress import progress
from obliteratus.core.run_folder import check_identity, lock_folder, write_atomic
from obliteratus.pipeline.recipe import dump_toml
from obliteratus.study.base import KnockoutResult
from obliteratus.study.material import check_study
from obliteratus.study.settings import Study
from obliteratus.study.workers import Local, Processes, Ray, Workers

RESULTS = "results.jsonl"


def run_study(
    made: Study,
    opening: Mapping[str, Any],
    folder: Path,
    *,
    resume: bool = False,
    workers: int = 1,
    ray: str = "",
) -> tuple[KnockoutResult, ...]:
    """Knock out every part that the study names, one at a time, and measure. Returns the baseline, then all parts.

    opening: options of `open_subject`, with which ``made.model`` is opened. folder: results are appended to its
    ``results.jsonl``, a few parts at a time; with ``resume`` those that are there are not measured again. workers:
    processes, each with its own copy of the model and its share of the cores. ray: ``local``, or the address of a Ray
    cluster on which the workers run.

    Raises UserError for what cannot work, before anything is measured.
    """
    check_study(made)
    folder.mkdir(parents=True, exist_ok=True)
    with lock_folder(folder):
        check_identity(folder / "identity.json", identity_of(made))
        (folder / "study.toml").write_text(dump_toml(made))
        kept = _kept(folder / RESULTS, resume)
        with closing(_workers(made, opening, workers, ray)) as pool:
            found = list(_appended(folder / RESULTS, pool, kept))
    return tuple(found)


def identity_of(made: Study) -> dict[str, Any]:
    """What must be the same for a study to go on: all but where it is written and what it is called."""
    return made.model_dump(mode="json", exclude={"name", "about", "output"})


def _workers(made: Study, opening: Mapping[str, Any], workers: int, ray: str) -> Workers:
    if ray:
        return Ray(made, opening, workers, ray)
    return Processes(made, opening, workers) if workers > 1 else Local(made, opening)


def _appended(path: Path, pool: Workers, kept: Sequence[KnockoutResult]) -> Iterator[KnockoutResult]:
    """Results as they come, each in the file before it is told."""
    done = {result.component for result in kept}
    yield from kept
    chunks = pool.chunks()
    total = sum(map(len, chunks))
    with path.open("a") as file, progress("STUDY parts", total) as advance:
        advance(max(0, len(done) - 1))
        if not kept:
            yield from _written(file, [pool.baseline()])
        left = [[name for name in chunk if name not in done] for chunk in chunks]
        for results in pool.measured([chunk for chunk in left if chunk]):
            yield from _written(file, results)
            advance(len(results))


def _written(file: Any, results: Sequence[KnockoutResult]) -> Sequence[KnockoutResult]:
    file.write("".join(result.model_dump_json() + "\n" for result in results))
    file.flush()
    return results


def _kept(path: Path, resume: bool) -> list[KnockoutResult]:
    """What an interrupted study has measured; a line that it was killed in the middle of is taken off the file."""
    if not path.is_file():
        return []
    if not resume:
        raise UserError(f"{path}: a study lies here; add --resume to go on with it, or name another folder")
    lines = path.read_text().split("\n")  # a whole line ends in a line feed, so the last is empty or torn
    write_atomic(path, "".join(line + "\n" for line in lines[:-1]))
    return [_result(line, f"{path}:{n}") for n, line in enumerate(lines[:-1], 1)]


def _result(line: str, where: str) -> KnockoutResult:
    try:
        return KnockoutResult.model_validate(json.loads(line))
    except (json.JSONDecodeError, ValidationError) as error:
        raise UserError(f"{where}: not a study's result; the file was changed, begin the study anew") from error
