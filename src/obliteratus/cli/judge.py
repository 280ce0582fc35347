"""The judge command: verdicts on a run's answers, out to a person and back."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from obliteratus.cli.options import Json
from obliteratus.core.errors import UserError, unknown_name
from obliteratus.core.run_folder import require_file

if TYPE_CHECKING:
    from obliteratus.core.results import Score
    from obliteratus.verify.answers import JudgedAnswer

COLUMNS = ("id", "group", "category", "prompt", "answer", "verdict", "label")
# What people write, for what the judge says.
SYNONYMS = {"refused": "shown", "complied": "absent", "yes": "shown", "no": "absent"}
LONGEST = 1 << 24  # characters of an answer; the csv module stops at 131072 otherwise


def judge(
    run_dir: Annotated[Path, typer.Argument(help="Output folder of a run, a search, a study or of verify --out.")],
    export: Annotated[Path | None, typer.Option(help="CSV file to write, with an empty column `label`.")] = None,
    labels: Annotated[Path | None, typer.Option(help="CSV file that --export wrote, with labels filled in.")] = None,
    top: Annotated[int, typer.Option(min=0, help="Answers to show of those that the rungs disagree about.")] = 10,
    json: Json = False,
) -> None:
    """Count the verdicts on a run's answers, export the answers for labeling, or compare verdicts with labels."""
    require_file(run_dir, "answers.jsonl")
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
        _show_verdicts(run_dir, answers, top, json)


def count_verdicts(answers: Sequence[JudgedAnswer]) -> dict[str, dict[str, int]]:
    """Return how often each verdict was given, by group and state, such as ``target after``."""
    counts: dict[str, Counter[str]] = {}
    for answer in answers:
        counts.setdefault(f"{answer.group} {answer.state}", Counter())[answer.verdict] += 1
    return {name: dict(found) for name, found in counts.items()}


def find_shared_openings(answers: Sequence[JudgedAnswer]) -> list[dict[str, Any]]:
    """Return the phrases that target answers before the edit begin with and control answers do not, with counts."""
    from obliteratus.verify.own_words import find_openings

    return [vars(phrase) for phrase in find_openings([vars(a) for a in answers if a.state == "before"])]


def find_disagreements(answers: Iterable[JudgedAnswer]) -> list[JudgedAnswer]:
    """Return the answers of which one rung says that they show the behavior, and another that they do not."""
    from obliteratus.judge.judge import SHOWN

    return [a for a in answers if len({verdict in SHOWN for verdict in a.rungs.values() if verdict}) > 1]


def export_answers(answers: Sequence[JudgedAnswer], file: Path) -> None:
    """Write the answers as CSV. Raises UserError if the file exists or cannot be written."""
    try:
        with file.open("x", newline="", encoding="utf-8-sig") as stream:  # spreadsheets know UTF-8 by its mark
            writer = csv.writer(stream)
            writer.writerow(COLUMNS)
            writer.writerows([*(getattr(answer, name) for name in COLUMNS[:-1]), ""] for answer in answers)
    except FileExistsError as error:
        raise UserError(f"--export {file}: the file exists; give another name, it may hold labels") from error
    except OSError as error:
        raise UserError(f"--export {file}: cannot be written ({error.strerror}); give another place") from error


def compare_with_labels(answers: Sequence[JudgedAnswer], file: Path) -> dict[str, dict[str, Score]]:
    """Return precision, recall and kappa against the labels that are filled in: of the verdict, and of each rung.

    A label is a verdict; shown and partial are one side, all others the other. Answers of which a rung says nothing do
    not count for it. Raises UserError for a file that does not fit the answers.
    """
    from obliteratus.judge.judge import SHOWN
    from obliteratus.verify.agreement import measure_agreement

    labels, known = read_labels(file), {answer.id: answer for answer in answers}
    for id, (answer, _) in labels.items():
        if id not in known or known[id].answer.split() != answer.split():  # editors change ends of lines
            raise UserError(
                f"--labels {file}: '{id}' is no answer of this run; give the file that was exported from it"
            )
    rungs = dict.fromkeys(name for id in labels for name in known[id].rungs)
    said: dict[str, Mapping[str, str | None]] = {"verdict": {id: known[id].verdict for id in labels}}
    said |= {name: {id: known[id].rungs.get(name) for id in labels} for name in rungs}
    return {
        name: measure_agreement(
            [v in SHOWN for v in verdicts.values() if v], [labels[id][1] in SHOWN for id, v in verdicts.items() if v]
        )
        for name, verdicts in said.items()
        if any(verdicts.values())
    }


def read_labels(file: Path) -> dict[str, tuple[str, str]]:
    """Return (answer, label) by id of all rows with a label. Raises UserError for a file without usable labels."""
    from obliteratus.judge.judge import VERDICTS

    rows = _read_rows(file)
    filled = {row["id"]: (row["answer"], row["label"].strip().lower()) for row in rows if (row["label"] or "").strip()}
    if not filled:
        raise UserError(f"--labels {file}: no label is filled in; write one of {', '.join(VERDICTS)} in column label")
    for id, (_, label) in filled.items():
        if label not in (*VERDICTS, *SYNONYMS):
            raise UserError(f"--labels {file}: row '{id}': {unknown_name('label', label, (*VERDICTS, *SYNONYMS))}")
    return {id: (answer, SYNONYMS.get(label, label)) for id, (answer, label) in filled.items()}


def _read_rows(file: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file with the columns id, answer and label, and no id twice. Raises UserError."""
    try:
        csv.field_size_limit(LONGEST)
        with file.open(newline="", encoding="utf-8-sig") as stream:
            rows = list(csv.DictReader(stream))
    except UnicodeDecodeError as error:
        raise UserError(f"--labels {file}: this is not UTF-8; save it as CSV in UTF-8") from error
    except (OSError, csv.Error) as error:
        raise UserError(f"--labels {file}: cannot be read ({error}); give a CSV file that --export wrote") from error
    if rows and len(rows[0]) == 1:
        raise UserError(f"--labels {file}: there is one column only; save it as CSV with commas")
    if rows and (missing := {"id", "answer", "label"} - rows[0].keys()):
        raise UserError(f"--labels {file}: column '{min(missing)}' is missing; give a CSV file that --export wrote")
    for id, times in Counter(row["id"] for row in rows).items():
        if times > 1:
            raise UserError(f"--labels {file}: '{id}' is there {times} times; keep one row of it")
    return rows


# -------------------------------------------------------------------------------------------- showing
def _show_export(n: int, file: Path, json: bool) -> None:
    from obliteratus.cli.terminal import say, show_json

    if json:
        show_json({"exported": n, "file": str(file)})
    else:
        say(f"Wrote {n} answers to {file}. Fill in the column label, then give the file to --labels.")


def _show_agreement(agreement: Mapping[str, Mapping[str, Score]], json: bool) -> None:
    from obliteratus.cli.terminal import show_json, show_table

    if json:
        show_json({rung: {name: s.model_dump() for name, s in scores.items()} for rung, scores in agreement.items()})
        return
    rows = [
        [rung, name, f"{s.value:.3f}", f"{s.low:.3f} to {s.high:.3f}", str(s.n)]
        for rung, scores in agreement.items()
        for name, s in scores.items()
    ]
    show_table("Verdicts against labels", ["who", "score", "value", "95 % interval", "n"], rows)


def _show_verdicts(run_dir: Path, answers: Sequence[JudgedAnswer], top: int, json: bool) -> None:
    from obliteratus.cli.terminal import say, show_json, show_table
    from obliteratus.verify.agreement import compare_rungs

    counts, openings = count_verdicts(answers), find_shared_openings(answers)
    agreement, unlike = compare_rungs([vars(answer) for answer in answers]), find_disagreements(answers)
    if json:
        pairs = {pair: score.model_dump() for pair, score in agreement.items()}
        shown = [vars(answer) for answer in unlike]
        show_json(counts | {"target answers begin with": openings, "kappa": pairs, "disagreements": shown})
        return
    names = sorted({verdict for found in counts.values() for verdict in found})
    rows = [[group, *(str(found.get(verdict, 0)) for verdict in names)] for group, found in counts.items()]
    show_table(f"Verdicts in {run_dir}", ["answers", *names], rows)
    if openings:
        lines = [[o["text"], str(o["target"]), str(o["control"])] for o in openings]
        show_table("Openings that target answers share", ["an answer began with", "target", "control"], lines)
    for pair, score in agreement.items():
        values = " to ".join(f"{round(end, 2) + 0:.2f}" for end in (score.low, score.high))
        say(f"Agreement of {pair}: κ {round(score.value, 2) + 0:.2f} ({values}, n {score.n})")
    if unlike[:top]:
        title = f"{len(unlike)} answers that the judges disagree about"
        title += f": the first {top}; --top N shows more" if len(unlike) > top else ""
        show_table(title, ["id", "answer", "verdicts"], [_disagreement_row(a) for a in unlike[:top]])


def _disagreement_row(answer: JudgedAnswer) -> list[str]:
    verdicts = ", ".join(f"{name}: {verdict}" for name, verdict in answer.rungs.items() if verdict)
    return [answer.id, " ".join(answer.answer.split()), verdicts]
