"""What the commands do, with the library alone: everything is checked before any weight is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import copytree
from time import perf_counter
from typing import Any, cast

from obliteratus.core.errors import UserError
from obliteratus.core.progress import note
from obliteratus.core.registry import RunInputs
from obliteratus.core.results import Run, Score
from obliteratus.core.run_folder import Store, check_disk, check_free, partial_folder, publish, workspace
from obliteratus.core.settings import Recipe, Step
from obliteratus.core.types import Plan, PromptSet, Subject
from obliteratus.distill import check_sizes
from obliteratus.excise.live.hooks import applied
from obliteratus.excise.plan import check_fits, load_plan
from obliteratus.inference.memory import memory_limit, parse_size
from obliteratus.pipeline.offloaded import both, opened
from obliteratus.pipeline.recipe import check_runs, load_recipe, parse_overrides, without_trial_count
from obliteratus.pipeline.run import ADVISED, run
from obliteratus.prompts import load_prompts, parts_checked
from obliteratus.rebirth.model_card import format_score
from obliteratus.rebirth.save import Form, bytes_needed, check_form, write_output
from obliteratus.search import SearchResult, StudyLocation, check_pick, search, searchable, with_trials
from obliteratus.search.output import JOURNAL, front_rows, write_front
from obliteratus.summon.load import open_subject, width_of
from obliteratus.verify import Measurement
from obliteratus.verify import measure as measure


@dataclass(frozen=True)
class Job:
    """A run that has been checked as far as it can be without the model."""

    model: str
    recipe: Recipe
    prompts: PromptSet
    sources: Mapping[str, str]
    out: Path | None
    form: Form
    place: StudyLocation | None = None
    """Of the study, where the recipe is a search."""
    pick: str = "knee"
    base: str = ""
    """Of a quantised model: what ``merged`` bakes into."""

    @classmethod
    def checked(
        cls,
        model: str,
        method: str,
        overrides: list[str],
        sources: Mapping[str, Any],
        out: Path | None,
        form: str,
        base: str = "",
    ) -> Job:
        """Raises UserError for anything in the request that cannot work."""
        check_form(form, base)
        made = load_recipe(method, parse_overrides(overrides))
        prompts = load_prompts(**sources)
        fit, _, _ = parts_checked(prompts, made.seed, made.searched)
        check_runs(made, prompts.groups)
        counts = {group: len(members) for group, members in fit.groups.items()}
        check_sizes(made.distill, RunInputs(counts, lambda: width_of(model), made.probe.keep))
        if out is not None:
            check_free(out)
        given = {group: str(source) for group, source in sources.items() if source is not None}
        job = cls(model, made, prompts, given, out, cast(Form, form), base=base)
        return job.searching() if made.search else job

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same for an interrupted run to go on."""
        return {
            "model": self.model,
            "recipe": without_trial_count(self.recipe),
            "prompts": self.prompts.digest,
            "form": self.form,
        } | ({"base": self.base} if self.base else {})

    def searching(
        self, trials: int | None = None, storage: str | None = None, study: str | None = None, pick: str = "knee"
    ) -> Job:
        """The same job as a search of the recipe's space, or of `searchable`'s. Raises UserError.

        storage: of the study; by default a journal in the run's folder, or memory if there is none.
        """
        check_pick(pick)
        made = searchable(self.recipe)
        made = made if trials is None else with_trials(made, trials)
        parts_checked(self.prompts, made.seed, searched=True)
        kept = storage or (str(partial_folder(self.out) / JOURNAL) if self.out else "")
        name = study or f"{Path(self.model).name} {made.name}"
        return replace(self, recipe=made, place=StudyLocation(kept, name), pick=pick)


@dataclass(frozen=True)
class JobResult:
    """What a job gave."""

    plan: Plan
    run: Run
    before: Measurement
    after: Measurement
    front: SearchResult | None = None
    """Of a search."""


def run_job(job: Job, opening: dict[str, Any], resume: bool, memory: str | None = None) -> JobResult:
    """Open the model, run the recipe, and save if an output folder was asked for.

    memory: the most that the process may hold, such as ``6GB``.
    """
    if resume and job.out is None:
        raise UserError("--resume: there is no run folder to resume; give --out FOLDER")
    packing = {"quantise": opening["quantise"]} if opening.get("quantise") else {}
    folder = workspace(job.out, job.identity | packing, resume) if job.out else nullcontext()
    with memory_limit(parse_size(memory) if memory else math.inf), folder as partial:
        subject = opened(job.model, opening)
        if job.out is not None:
            check_disk(job.out, bytes_needed(subject, job.form, job.base), partial)
        store = Store(partial)
        front = search(job.recipe, subject, job.prompts, store, job.place, job.pick) if job.place else None
        plan, found = (front.plan, front.run) if front else run(job.recipe, subject, job.prompts, store)
        found = found.model_copy(update={"prompts": {**found.prompts, "sources": dict(job.sources)}})
        if partial is not None and job.out is not None:
            report = parts_checked(job.prompts, job.recipe.seed)[2]
            start = perf_counter()
            found = write_output(subject, plan, found, partial, job.form, report, job.base)
            if front:
                write_front(front, partial / "output", partial / JOURNAL)
            if found.advice:
                copytree(partial / ADVISED, partial / "output" / "analysis")
            note("REBIRTH", f"{perf_counter() - start:.1f} s")
            publish(partial, job.out)
    return JobResult(plan, found, *both(store), front)


def show_result(done: JobResult, out: Path | None, json: bool) -> None:
    """run.json, or the tables."""
    from obliteratus.cli.terminal import make_table, results, show_json, show_run

    if json:
        show_json(done.run.model_dump(mode="json"))
        return
    show_run(done.run)
    if done.front:
        results.print(make_table("Front, on search prompts", *front_rows(done.front)))
    where = f"[bold]Saved[/]   {out} ({done.run.saved['form']})" if out else "Nothing saved: give --out FOLDER."
    results.print(where)


def show_answers(done: JobResult, n: int = 3) -> None:
    """Some held-out target prompts with the answers before and after, on stdout."""
    from obliteratus.cli.terminal import make_table, results

    rows: list[list[str]] = []
    for before, after in zip(done.before.records, done.after.records, strict=True):
        if before["group"] == "target" and len(rows) < n:
            rows.append([before["prompt"], before["answer"], after["answer"]])
    results.print(make_table("Held-out answers", ["prompt", "before", "after"], rows))


def compare_models(
    model: str, against: str | None, prompts: PromptSet, opening: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Scores of a base (if given) and of a model, as plain data with a text for people."""
    steps = (Step(use="refusal"), Step(use="first_token_kl"), Step(use="perplexity"))
    before = None
    if against is not None:
        base = open_subject(against, **opening)
        before = measure(base, prompts, steps)
        tokens = len(base.tokenizer)
        del base
    subject = open_subject(model, **opening)
    if before is not None and len(subject.tokenizer) != tokens:
        raise UserError(f"{model}: its vocabulary differs from that of {against}; compare a model with its own base")
    after = measure(subject, prompts, steps, before)
    return _plain(before.scores if before else {}), _plain(after.scores)


def _plain(scores: Mapping[str, Score]) -> dict[str, Any]:
    return {name: {**score.model_dump(), "text": format_score(score)} for name, score in scores.items()}


def apply_plan(
    folder: Path, model: str, out: Path, form: str, opening: dict[str, Any], base: str = ""
) -> dict[str, Any]:
    """Load a plan, check that it fits the model, and save the edited model."""
    check_form(form, base)
    check_free(out)
    plan = load_plan(folder)
    made = _run_of(folder)
    subject: Subject = open_subject(model, **opening)
    check_fits(subject, plan)
    check_disk(out, bytes_needed(subject, cast(Form, form), base), partial_folder(out))
    with workspace(out, {"plan": str(folder), "model": model, "form": form}, resume=True) as partial:
        with applied(subject, plan):
            pass  # fails here, before anything is written, if a site cannot be edited
        saved = write_output(subject, plan, made, partial, cast(Form, form), base=base)
        publish(partial, out)
    return saved.model_dump(mode="json")


def _run_of(folder: Path) -> Run:
    path = folder / "run.json"
    if not path.is_file():
        raise UserError(f"{folder}: no run.json beside the plan; give the output folder of a run")
    return Run.model_validate_json(path.read_text())
