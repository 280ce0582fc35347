"""Do what the commands ask for, with the library alone. Everything is checked before any weight is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from shutil import copytree
from typing import TYPE_CHECKING, Any, cast

from obliteratus.cli.usage import fill_example_prompts
from obliteratus.core.chat import DEFAULT_CHAT
from obliteratus.core.choices import Form, parse_size
from obliteratus.core.clock import Clock
from obliteratus.core.errors import UserError
from obliteratus.core.progress import note
from obliteratus.core.registry import RunInputs
from obliteratus.core.results import Run
from obliteratus.core.run_folder import (
    Store,
    check_disk,
    check_free,
    check_identity,
    keep_time,
    partial_folder,
    publish,
    workspace,
)
from obliteratus.core.settings import JudgeSettings, Recipe
from obliteratus.core.toml import parse_overrides
from obliteratus.core.types import Plan, PromptSet, Splits, Subject
from obliteratus.distill import check_sizes
from obliteratus.excise.live.hooks import applied
from obliteratus.inference.answers import AnswerDecoder
from obliteratus.inference.chat_template import render_prompts
from obliteratus.inference.determinism import deterministic, fix_memory
from obliteratus.inference.generate import generate
from obliteratus.inference.memory import memory_limit
from obliteratus.judge.behavior import Behavior
from obliteratus.pipeline.offloaded import open_within_memory
from obliteratus.pipeline.recipe import check_runs, load_recipe, without_trial_count
from obliteratus.pipeline.run import RunResult, run_on_splits
from obliteratus.pipeline.stages import ADVICE, TUNE
from obliteratus.prompts import check_enough, check_splits, load_prompts, split_prompts
from obliteratus.rebirth.headline import describe_headline
from obliteratus.rebirth.run_page import PAGE, write_run_page
from obliteratus.rebirth.save import check_form, default_form, estimate_saved_bytes, write_output
from obliteratus.share.recording import describe_request, write_reproduction
from obliteratus.summon.fingerprint import describe_loading, fingerprint_files
from obliteratus.summon.load import read_width
from obliteratus.tune.front import FRONT
from obliteratus.verify import Measurement
from obliteratus.verify.answers import write_answers
from obliteratus.verify.first_token_changes import write_first_tokens
from obliteratus.verify.ladder import check_judge, embed_files

if TYPE_CHECKING:  # only a search imports Optuna
    from obliteratus.search import SearchResult, StudyLocation


@dataclass(frozen=True)
class Job:
    """A request for a run or a search, checked as far as possible without the model."""

    model: str
    recipe: Recipe
    prompts: PromptSet
    splits: Splits
    out: Path | None
    form: Form
    location: StudyLocation | None = None
    """Where the study is kept, if the recipe is a search."""
    pick: str = "balanced"
    base: str = ""
    """Full-precision checkpoint to bake into, if the model is quantized."""
    force: bool = False
    """Whether to edit a model that does not show the behavior."""
    columns: str | Mapping[str, str] = field(default="")
    """Column of the prompts in files, for all groups or by group."""

    @classmethod
    def create(
        cls,
        model: str,
        method: str,
        overrides: list[str],
        sources: Mapping[str, Any],
        out: Path | None,
        form: str,
        base: str = "",
        force: bool = False,
    ) -> Job:
        """Check a request and return it as a job. Raises UserError for anything in it that cannot work."""
        asked, form = form, form or default_form(model)
        check_form(form, base, model)
        _check_saving(out, asked, base)
        recipe = load_recipe(method, parse_overrides(overrides))
        return cls.from_recipe(model, recipe, sources, out, form, base, force)

    @classmethod
    def from_recipe(
        cls,
        model: str,
        recipe: Recipe,
        sources: Mapping[str, Any],
        out: Path | None,
        form: str,
        base: str = "",
        force: bool = False,
    ) -> Job:
        """Return the job of a loaded recipe and a checked form. Raises UserError as `create` does."""
        recipe = recipe.model_copy(update={"judge": embed_files(recipe.judge)})
        sources = add_examples(sources, check_judge(recipe.judge))
        prompts = load_prompts(**sources)
        splits = split_prompts(prompts, recipe.seed, recipe.uses_search_split, split_by=recipe.split_by, force=force)
        recipe = check_runs(recipe, prompts.groups)
        counts = {group: len(members) for group, members in splits.fit.groups.items()}
        check_sizes(recipe.distill, RunInputs(counts, lambda: read_width(model), recipe.probe.keep))
        if out is not None:
            check_free(out)
        job = cls(model, recipe, prompts, splits, out, cast(Form, form), base=base, force=force)
        job = replace(job, columns=sources.get("column") or "")
        return job.with_search() if recipe.search else job

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same for an interrupted run to resume, before the model is loaded."""
        return {
            "model": self.model,
            "recipe": without_trial_count(self.recipe),
            "prompts": self.prompts.digest,
            "form": self.form,
            "base": self.base,
            **fingerprint_files(self.model),
        }

    def with_search(
        self, trials: int | None = None, storage: str | None = None, study: str | None = None, pick: str = "balanced"
    ) -> Job:
        """Return the job as a search of the recipe's space, or of the default space. Raises UserError.

        storage: of the study. The default is a journal in the run's folder, or memory if there is no folder.
        """
        from obliteratus.search import StudyLocation, add_default_search, check_pick, set_trial_count
        from obliteratus.search.output import JOURNAL

        check_pick(pick)
        recipe = add_default_search(self.recipe)
        recipe = recipe if trials is None else set_trial_count(recipe, trials)
        check_splits(self.splits, uses_search_split=True)
        if not self.force:
            check_enough(self.splits, uses_search_split=True)
        storage = storage or (str(partial_folder(self.out) / JOURNAL) if self.out else "")
        name = study or f"{Path(self.model).name} {recipe.name}"
        return replace(self, recipe=recipe, location=StudyLocation(storage, name), pick=pick)


NOTHING_FIXED: AbstractContextManager[object] = nullcontext()


def fix_bits(asked: bool, threads: int = 0, memory: int = 0) -> AbstractContextManager[object]:
    """Return the context of `deterministic` if it is asked for, or one that does nothing."""
    return deterministic(threads, memory) if asked else NOTHING_FIXED


EXAMPLES = 3  # prompts whose answers the demo shows: with three, a second kind of answer is mostly among them
WHOLE = 160  # tokens of such an answer: most answers of small models end before, and three take seconds


@dataclass(frozen=True)
class JobResult:
    """The result of a job."""

    run: Run
    before: Measurement
    after: Measurement
    seconds: dict[str, float]
    """By stage, and ``other``; they add up to the whole."""
    search: SearchResult | None = None
    """The result of the search, if the job was one."""
    examples: tuple[tuple[str, str, str], ...] = ()
    """Prompts with whole answers before and after the edit."""


def _check_saving(out: Path | None, form: str, base: str) -> None:
    """Raise UserError for options that need an output folder if there is none."""
    if out is None and (form not in ("", "merged") or base):
        option = f"--base {base}" if base else f"--save {form}"
        raise UserError(f"{option}: there is no folder to save to; give --out FOLDER")


def add_examples(sources: Mapping[str, Any], behavior: Behavior) -> dict[str, Any]:
    """Return `fill_example_prompts` with the examples of a loaded behavior. Raises UserError as it does."""
    head = behavior.head
    examples = {"target": head.target, "control": head.control, "keep": head.keep}
    return fill_example_prompts(sources, behavior.name, examples)


def load_with_examples(sources: Mapping[str, Any], judging: JudgeSettings) -> PromptSet:
    """Load prompts, those that the behavior brings for groups without a source. Raises UserError as `add_examples`."""
    return load_prompts(**add_examples(sources, check_judge(judging)))


def run_job(
    job: Job,
    opening: dict[str, Any],
    clock: Clock,
    resume: bool,
    memory: str | None = None,
    examples: int = 0,
    fixed: AbstractContextManager[object] = NOTHING_FIXED,
) -> JobResult:
    """Open the model, run the recipe, and save the result if an output folder is given.

    opening: arguments of `open_subject`. clock: measures the stages. memory: the most that the process may hold, such
    as ``6GB``. examples: number of target prompts that are answered at length before and after the edit. fixed: the
    context to do all this in; see `fix_bits`.
    """
    _announce(job, resume)
    folder: AbstractContextManager[Path | None] = nullcontext()
    if job.out:
        with clock.time("FILES"):
            folder = workspace(job.out, job.identity, resume)
    with fixed, memory_limit(parse_size(memory) if memory else math.inf), folder as partial:
        store = Store(partial, clock)
        with clock.time("SUMMON"):
            subject = _open(job.model, opening, partial)
        if job.out is not None:
            check_disk(job.out, estimate_saved_bytes(subject, job.form, job.base), partial)
        with fix_memory(subject):
            result = _search_or_run(job, subject, store)
        record = result.run.model_copy(update={"prompts": {**result.run.prompts, "sources": dict(job.prompts.sources)}})
        answers = _answer_examples(subject, result.plan, job, clock, examples) if examples else ()
        if partial is not None and job.out is not None:
            with clock.time("REBIRTH"):
                record = _write(job, subject, result, record, partial)
                request = describe_request(subject, opening, (job.form, job.pick, job.force, memory))
                parts = (job.prompts, job.columns, job.recipe)
                write_reproduction(subject, *parts, request, record, partial / "output")
            publish(partial, job.out)
    front = None if isinstance(result, RunResult) else result
    return JobResult(record, result.before, result.after, clock.account(), front, answers)


def _search_or_run(job: Job, subject: Subject, store: Store) -> SearchResult | RunResult:
    if not job.location:
        return run_on_splits(job.recipe, subject, job.splits, store, job.force)
    from obliteratus.search import search

    return search(job.recipe, subject, job.splits, store, job.location, job.pick, job.force)


def _write(job: Job, subject: Subject, result: SearchResult | RunResult, record: Run, partial: Path) -> Run:
    """Write the output folder, and return the record as it was saved."""
    record = write_output(subject, result.plan, record, partial, job.form, job.splits.report, job.base)
    write_answers(result.before, result.after, partial / "output")
    if not isinstance(result, RunResult):
        from obliteratus.search.output import JOURNAL, write_front

        write_front(result, partial / "output", partial / JOURNAL)
    if record.advice:
        copytree(partial / ADVICE, partial / "output" / "analysis")
    if job.recipe.tune:
        copytree(partial / TUNE / FRONT, partial / "output" / FRONT)
    write_first_tokens(result.before, result.after, subject, job.splits.report["control"], partial / "output")
    write_run_page(partial / "output")
    return record


def _answer_examples(subject: Subject, plan: Plan, job: Job, clock: Clock, n: int) -> tuple[tuple[str, str, str], ...]:
    """Return the first report target prompts with their whole answers before and after the edit.

    The answers that are measured are shorter, and end as soon as they show the behavior.
    """
    prompts = job.splits.report["target"][:n]
    ids = render_prompts(subject, prompts, reserve=WHOLE)
    with clock.time("EXAMPLES"):
        before = generate(subject, ids, WHOLE, title="EXAMPLES before")
        with applied(subject, plan):
            after = generate(subject, ids, WHOLE, title="EXAMPLES after")
    decoder = AnswerDecoder.create(subject)
    texts = [
        [end_answer(text, len(row)) for text, row in zip(decoder.decode_all(rows), rows, strict=True)]
        for rows in (before, after)
    ]
    return tuple(zip([prompt.text for prompt in prompts], *texts, strict=True))


def end_answer(text: str, tokens: int) -> str:
    """Return an answer of so many tokens in one paragraph. One that was not over ends with a remark."""
    whole = " ".join(text.split())
    return whole if tokens < WHOLE else f"{whole} [goes on; {WHOLE} tokens are shown]"


def _announce(job: Job, resume: bool) -> None:
    """Say before all work what will not happen. Raises UserError if there is no folder to resume."""
    if job.out is None and resume:
        raise UserError("--resume: there is no run folder to resume; give --out FOLDER")
    if job.out is None:
        note("save", "no --out: the edited model will be measured and not saved")
    elif resume and not partial_folder(job.out).exists():
        note("resume", f"there is no interrupted run in {partial_folder(job.out)}, so this one starts anew")


def _open(model: str, opening: Mapping[str, Any], partial: Path | None) -> Subject:
    """Open the model, and check that an interrupted run had loaded it in the same way."""
    if partial is None:
        return open_within_memory(model, dict(opening))
    subject = open_at_kept_time(model, opening, partial)
    check_identity(partial / "loading.json", describe_loading(subject))
    return subject


def open_at_kept_time(model: str, opening: Mapping[str, Any], partial: Path) -> Subject:
    """Open the model with the time that an interrupted run in this folder told its chat template, or else with now."""
    chat = opening.get("chat", DEFAULT_CHAT)
    return open_within_memory(model, {**opening, "chat": replace(chat, now=keep_time(partial, chat.now))})


def name_free_folder(place: Path, name: str, resume: bool) -> Path:
    """Return the first of NAME, NAME-2 … that is free in a folder; to resume, the one that was left."""
    names = (name + (f"-{i}" if i > 1 else "") for i in count(1))
    folders = (place / name for name in names)
    return next(f for f in folders if not f.exists() and (resume or not partial_folder(f).exists()))


def show_result(result: JobResult, out: Path | None, json: bool) -> None:
    """Print run.json, or tables, and at the end what was achieved and what to do next."""
    from obliteratus.cli.scores import show_run
    from obliteratus.cli.stage_names import format_times
    from obliteratus.cli.terminal import say, show_json, show_table

    if json:
        show_json(result.run.model_dump(mode="json"))
        return
    show_run(result.run)
    if result.search:
        from obliteratus.search.output import front_rows

        columns, rows = front_rows(result.search)
        show_table("Front, on search prompts; the arrow points to the chosen one", columns[:-1], [r[:-1] for r in rows])
        for number, *_, values in rows:
            say(f"{number.split()[0]}: {values}")
    _show_examples(result.examples)
    say(format_times(result.seconds), "Time")
    if out:
        say(f"{out} ({result.run.saved['form']})", "Saved")
        say(f"{out}/{PAGE}", "Page")
    say(describe_headline(result.run), "Done")
    say(_suggest_next(result, out), "Next")


def _show_examples(examples: Sequence[tuple[str, str, str]]) -> None:
    """Print prompts with their answers before and after the edit."""
    from obliteratus.cli.terminal import results, say

    for prompt, before, after in examples:
        say(prompt, "Prompt")
        say(before, "Before")
        say(after, "After")
        results.out("")


def _suggest_next(result: JobResult, out: Path | None) -> str:
    """Return a sentence that says what a user mostly wants after such a run."""
    model = result.run.source["id"]
    if out is None:
        return "Nothing was saved. The same command with --out FOLDER saves the edited model."
    places = {"merged": out, "gguf": out / result.run.saved.get("file", "")}
    place = places.get(result.run.saved["form"])
    chat = f"obliteratus chat {place} talks to it" if place else ""
    chat = chat or f"obliteratus chat {model} --plan {out} talks to it"
    return f"{chat}; obliteratus judge {out} goes through its answers."
