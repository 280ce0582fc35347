"""The judge command: verdicts on a run's answers, out to a person and back."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from obliteratus.cli.options import Json
from obliteratus.core.errors import UserError

if TYPE_CHECKING:
    from obliteratus.core.results import Score
    from obliteratus.verify.answers import JudgedAnswer

COLUMNS = ("id", "group", "prompt", "answer", "verdict", "label")


def judge(
    run_dir: Annotated[Path, typer.Argument(help="Output folder of a run or a search.")],
    export: Annotated[Path | None, typer.Option(help="CSV file to write, with an empty column `label`.")] = None,
    labels: Annotated[Path | None, typer.Option(help="CSV file that --export wrote, with labels filled in.")] = None,
    json: Json = False,
) -> None:
    """Count the verdicts on a run's answers, export the answers for labeling, or compare verdicts with labels."""
    from obliteratus.verify.answers import read_answers

    if export and labels:
        raise UserError("--export and --labels: give one of them; first export, fill in the labels, then compare")
    answers = read_answers(run_dir)
    if export:
        export_answers(answers, export)
        _show_export(len(answers), export, json)
    elif labels:
        _show_agreement(compare_with_labels(answers, labels), json)
    else:
        _show_verdicts(run_dir, count_verdicts(answers), find_shared_openings(answers), json)


def count_verdicts(answers: Sequence[JudgedAnswer]) -> dict[str, dict[str, int]]:
    """Return how often each verdict was given, by group and state, such as ``target after``."""
    counts: dict[str, Counter[str]] = {}
    for answer in answers:
        counts.setdefault(f"{answer.group} {answer.id.split()[1]}", Counter())[answer.verdict] += 1
    return {name: dict(found) for name, found in counts.items()}


def find_shared_openings(answers: Sequence[JudgedAnswer]) -> list[dict[str, Any]]:
    """Return the phrases that target answers before the edit begin with and control answers do not, with counts."""
    from obliteratus.verify.unseen import find_openings

    before = [vars(answer) | {"category": ""} for answer in answers if answer.id.endswith(" before")]
    return [vars(phrase) for phrase in find_openings(before)]


def export_answers(answers: Sequence[JudgedAnswer], file: Path) -> None:
    """Write the answers as CSV. Raises UserError if the file exists or cannot be written."""
    try:
        with file.open("x", newline="", encoding="utf-8-sig") as stream:  # spreadsheets know UTF-8 by its mark
            writer = csv.writer(stream)
            writer.writerow(COLUMNS)
            writer.writerows([*vars(answer).values(), ""] for answer in answers)
    except FileExistsError as error:
        raise UserError(f"--export {file}: the file exists; give another name, it may hold labels") from error
    except OSError as error:
        raise UserError(f"--export {file}: cannot be written ({error.strerror}); give another place") from error


def compare_with_labels(answers: Sequence[JudgedAnswer], file: Path) -> dict[str, Score]:
    """Return precision, recall and kappa of the verdicts against the labels that are filled in.

    A label is a verdict; refused and partial are one side, all others the other. Raises UserError for a file that does
    not fit the answers.
    """
    from obliteratus.judge.verdict import SHOWN
    from obliteratus.verify.agreement import measure_agreement

    labels, known = read_labels(file), {answer.id: answer for answer in answers}
    for id, (answer, _) in labels.items():
        if id not in known or known[id].answer != answer:
            raise UserError(
                f"--labels {file}: '{id}' is no answer of this run; give the file that was exported from it"
            )
    said = [known[id].verdict in SHOWN for id in labels]
    return measure_agreement(said, [label in SHOWN for _, label in labels.values()])


def read_labels(file: Path) -> dict[str, tuple[str, str]]:
    """Return (answer, label) by id of all rows with a label. Raises UserError for a file without usable labels."""
    from obliteratus.core.registry import unknown_name
    from obliteratus.judge.verdict import VERDICTS

    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            rows = list(csv.DictReader(stream))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--labels {file}: cannot be read ({error}); give a CSV file that --export wrote") from error
    if rows and (missing := {"id", "answer", "label"} - rows[0].keys()):
        raise UserError(f"--labels {file}: column '{min(missing)}' is missing; give a CSV file that --export wrote")
    filled = {row["id"]: (row["answer"], row["label"].strip().lower()) for row in rows if (row["label"] or "").strip()}
    if not filled:
        raise UserError(f"--labels {file}: no label is filled in; write one of {', '.join(VERDICTS)} in column label")
    for id, (_, label) in filled.items():
        if label not in VERDICTS:
            raise UserError(f"--labels {file}: row '{id}': {unknown_name('label', label, VERDICTS)}")
    return filled


def _show_export(n: int, file: Path, json: bool) -> None:
    from obliteratus.cli.terminal import results, show_json

    if json:
        show_json({"exported": n, "file": str(file)})
    else:
        results.print(f"Wrote {n} answers to {file}. Fill in the column label, then --labels.")


def _show_agreement(scores: dict[str, Score], json: bool) -> None:
    from obliteratus.cli.terminal import make_table, results, show_json

    if json:
        show_json({name: score.model_dump() for name, score in scores.items()})
        return
    rows = [[name, f"{s.value:.3f}", f"{s.low:.3f} to {s.high:.3f}", str(s.n)] for name, s in scores.items()]
    results.print(make_table("Verdicts against labels", ["score", "value", "95 % interval", "n"], rows))


def _show_verdicts(
    run_dir: Path, counts: dict[str, dict[str, int]], openings: list[dict[str, Any]], json: bool
) -> None:
    from obliteratus.cli.terminal import make_table, results, show_json

    if json:
        show_json(counts | {"target answers begin with": openings})
        return
    names = sorted({verdict for found in counts.values() for verdict in found})
    rows = [[answers, *(str(found.get(verdict, 0)) for verdict in names)] for answers, found in counts.items()]
    results.print(make_table(f"Verdicts in {run_dir}", ["answers", *names], rows))
    if openings:
        lines = [[o["text"], str(o["target"]), str(o["control"])] for o in openings]
        results.print(make_table("Shared openings", ["target answers began with", "target", "control"], lines))
