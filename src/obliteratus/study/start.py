"""Run an ablation study from Python, on a model in memory or by name, and show its result."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from obliteratus.core.errors import UserError
from obliteratus.core.progress import shows_progress
from obliteratus.core.run_folder import check_free
from obliteratus.core.types import Subject
from obliteratus.core.views import Plottable, Rows, register_view
from obliteratus.report.curves import Figure
from obliteratus.report.notebook import make_view
from obliteratus.study.base import KnockoutResult
from obliteratus.study.files import fill_prompts, load_study
from obliteratus.study.output import write_report
from obliteratus.study.plots import study_pictures
from obliteratus.study.ranking import knockout_results
from obliteratus.study.run import measure_study, open_folder
from obliteratus.study.settings import Study
from obliteratus.study.tables import changes_table, ordered_metrics, summarize, to_csv
from obliteratus.verify.ladder import embed_files


@dataclass(frozen=True, repr=False)
class StudyResult(Plottable):
    """The baseline of a study, and the result of each part that was knocked out."""

    title: str
    results: tuple[KnockoutResult, ...]
    """The baseline first."""
    folder: Path | None = None
    """Where tables, plots and the page are, if they were saved."""

    @property
    def parts(self) -> list[KnockoutResult]:
        """The results without the baseline."""
        return knockout_results(self.results)

    def describe(self) -> str:
        """Return how many parts there are, and which one matters most."""
        metric = ordered_metrics(self.results)[0]
        return f"{self.title}, {len(self.parts)} parts; by {metric}: {summarize(self.results, metric)}"


@shows_progress
def run_study(
    study: Study | str | Path,
    subject: Subject | str = "",
    out: str | Path | None = None,
    *,
    changes: Mapping[str, Any] | None = None,
    resume: bool = False,
    workers: int = 1,
) -> StudyResult:
    """Knock out parts of a model one at a time, measure what breaks, and return all changes with their intervals.

    study: a preset's name, a TOML file, or a `Study`. subject: the model, or where it lies; empty takes the study's. A
    model with several ``workers`` (processes) is opened by each, so it has to be given by name. out: a folder for the
    results, tables and the page, with ``resume`` one of an interrupted study; None keeps nothing. changes: values of
    the study by path, such as ``{"data.samples": 8}``. Raises UserError for what cannot work, before anything is
    measured.

    >>> ob.run_study(study, subject)  # doctest: +ELLIPSIS
    <StudyResult: Study layers of memory:tiny, 8 parts; by perplexity: ...>
    """
    held = subject if isinstance(subject, Subject) else None
    if held is not None and workers > 1:
        raise UserError("run_study: several workers each open the model; give its folder or id instead of the subject")
    made = _load(study, subject if isinstance(subject, str) else subject.source.id, changes)
    if not made.model:
        raise UserError("run_study: the study names no model; give one as subject")
    folder = Path(out) if out else None
    if folder is not None and not resume:
        check_free(folder)
    title = f"Study {made.name or 'without a name'} of {made.model}"
    with open_folder(folder) as place:
        opening = {"dtype": made.dtype}
        results = measure_study(made, opening, place, resume=resume, workers=workers, subject=held)
        if folder is not None:
            write_report(results, folder, title)
    return StudyResult(title, results, folder)


def _load(study: Study | str | Path, model: str, changes: Mapping[str, Any] | None) -> Study:
    """Return the study with its model and prompts. Raises UserError for one that does not exist, and wrong values."""
    if isinstance(study, Study):
        if changes:
            raise UserError("run_study: changes are of a study by name; change the Study itself by model_copy")
        made = study
    else:
        made = load_study(study, changes)
    made = made.model_copy(update={"model": model}) if model else made
    return fill_prompts(made.model_copy(update={"judge": embed_files(made.judge)}))


# ---------------------------------------------------------------------------------------------- views
def tabulate_study(result: StudyResult) -> Rows:
    """Return a row for each result, as results.csv has it, with numbers as numbers."""
    columns, *rows = csv.reader(io.StringIO(to_csv(result.results)))
    return columns, [[_to_value(cell) for cell in row] for row in rows]


def _to_value(cell: str) -> Any:
    if cell in ("True", "False"):
        return cell == "True"
    try:
        return float(cell)
    except ValueError:
        return cell or None


def draw_study(result: StudyResult, figure: Figure) -> None:
    """Draw the changes of the parts that matter most, by the study's first metric."""
    picture = next(iter(study_pictures(result.results, ordered_metrics(result.results)[0]).values()), None)
    if picture is None:
        raise UserError(f"{result.title}: no part was measured, so there is nothing to draw")
    figure.set_size_inches(*picture.size)
    picture.draw(figure)


def show_study(result: StudyResult) -> tuple[str, Rows]:
    """Return what was found, and the table of changes."""
    columns, rows = changes_table(result.results)
    return result.describe(), (columns, [list(row) for row in rows])


register_view(StudyResult, make_view(tabulate_study, draw_study, show_study))
