"""What the browser can do: run, stop, resume, answer and export, all of it as jobs for one model in memory."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple, cast

from obliteratus.core.chat import Turn
from obliteratus.core.choices import Form
from obliteratus.core.errors import UserError
from obliteratus.core.results import Run
from obliteratus.core.run_folder import partial_folder
from obliteratus.core.types import Plan
from obliteratus.excise.plan import load_plan
from obliteratus.inference.stream import AnswerLimits
from obliteratus.rebirth.save import check_form, save
from obliteratus.serve.dial import Answer, Dial
from obliteratus.serve.ui.job_queue import Job, JobQueue, Written
from obliteratus.serve.ui.requests import RunRequest, check_names, find_model, load_request, save_request
from obliteratus.serve.ui.workspace import FrontMember, Workspace
from obliteratus.summon.coverage import summarize_plan_coverage
from obliteratus.summon.load import open_subject
from obliteratus.weights.organism import find_local, is_local
from obliteratus.weights.organism_files import list_organisms

RunMethod = Callable[[RunRequest, Path, bool, bool], None]
"""Runs a request: (request, output folder, whether to resume, whether only to check it). The command line's own."""

SETTLE = 0.15  # seconds: a dial that is dragged reports every step, and only where it comes to rest is answered


class Asked(NamedTuple):
    """A conversation that is to be answered."""

    turns: Sequence[Turn]
    """The last is the user's."""
    strength: float
    """Of the edit; 0 for the unedited model."""


@dataclass
class HeldModel:
    """The one model in memory, with the plan that was last talked to."""

    opening: dict[str, Any]
    """Arguments of `open_subject`."""
    source: str = ""
    plan: str = ""
    dial: Dial | None = None

    def get(self, source: str, plan: str) -> Dial:
        """Return the model with the plan in a folder, or with none for ''. Another model is let go first."""
        if self.dial is None or source != self.source:
            self.release()
            self.dial, self.source, self.plan = Dial(open_subject(source, **self.opening)), source, ""
        if plan != self.plan:
            self.dial, self.plan = Dial(self.dial.subject, load_plan(plan) if plan else Plan()), plan
        return self.dial

    def release(self) -> None:
        """Let the model go."""
        self.dial, self.source, self.plan = None, "", ""
        gc.collect()  # a model refers to itself, and the next one needs its memory


@dataclass
class Workbench:
    """The state behind all browser tabs."""

    workspace: Workspace
    run_method: RunMethod
    models: Mapping[str, str] = field(default_factory=dict)
    """Models named when the program was started: what the page calls each → its source."""
    opening: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.queue, self.held = JobQueue(self.hide_places), HeldModel(self.opening)
        self._answering: dict[str, int] = {}
        self._turns: dict[str, int] = {}
        self._lock = Lock()

    def hide_places(self, text: str) -> str:
        """Return a text for the page, in which folders are called by their names alone."""
        for name, source in self.models.items():
            text = text.replace(source, name)
        return self.workspace.hide_root(text)

    # ------------------------------------------------------------------------------------- choices
    @cached_property
    def organisms(self) -> list[str]:
        """Names of the model organisms that could be opened when the program was started."""
        return [name for name in sorted(list_organisms()) if not is_local(name) or find_local(name).is_dir()]

    def list_models(self) -> list[str]:
        """Return the models to choose from: those named at the start, those of the workspace, and organisms."""
        return [*self.models, *self.workspace.list_models(), *(f"organism:{name}" for name in self.organisms)]

    def list_voices(self) -> list[str]:
        """Return what can be talked to: finished runs, then models."""
        return [*self.workspace.list_runs(), *self.list_models()]

    def has_recipe(self, name: str, number: int) -> bool:
        """Return whether a member of a front has a recipe and no plan, so that it must be run to be talked to."""
        members = self.workspace.list_front(name) if name in self.workspace.list_runs() else []
        return any(member.number == number and member.plan is None for member in members)

    # ---------------------------------------------------------------------------------------- runs
    def start_run(self, request: RunRequest, name: str = "") -> int:
        """Check a request and put it into the queue; return its job. Raises UserError for what cannot work."""
        check_names(request)
        return self._start(request, name)

    def _start(self, request: RunRequest, name: str) -> int:
        model = find_model(self.workspace, self.models, request.model)
        request = request.model_copy(update={"model": model})
        wish = name or f"{Path(request.model.replace(':', '-')).name}-{_method_name(request.method)}"
        with self._lock:
            name = self.workspace.new_name("runs", wish)
            self.run_method(request, self.workspace.path("runs", name), False, True)
            save_request(self.workspace, name, request)
        return self._queue_run(name, request, resume=False)

    def resume_run(self, name: str) -> int:
        """Put an interrupted run into the queue again. Raises UserError if there is none of that name."""
        if name not in self.workspace.list_interrupted():
            raise UserError(f"{name or 'no name'}: choose an interrupted run")
        request = load_request(self.workspace, name)
        find_model(self.workspace, self.models, request.model)
        return self._queue_run(name, request, resume=True)

    def discard_run(self, name: str) -> None:
        """Remove what an interrupted run has left. Raises UserError if there is none of that name, or it runs again."""
        if name not in self.workspace.list_interrupted():
            raise UserError(f"{name or 'no name'}: choose an interrupted run")
        if any(not state.finished and state.kind == "run" for state in self.queue.states()):
            raise UserError(f"{name}: wait until no run is going on, or stop it")
        self.workspace.discard(name)

    def run_member(self, name: str, number: int) -> int:
        """Run the recipe of a member of a search's front, so that there is a plan to talk to. Returns its job."""
        member = self._member(name, number)
        if member.recipe is None:
            raise UserError(f"{name}, member {number}: it has no recipe of its own")
        asked = load_request(self.workspace, name)
        update: dict[str, Any] = {"method": str(member.recipe), "changes": (), "trials": None}
        return self._start(asked.model_copy(update=update), f"{name}-member-{number}")

    def _queue_run(self, name: str, request: RunRequest, resume: bool) -> int:
        def work(job: Job) -> str:
            self.held.release()
            try:
                self.run_method(request, self.workspace.path("runs", name), resume, False)
            except KeyboardInterrupt as error:
                raise KeyboardInterrupt(self._describe_rest(name)) from error
            return "See it in Results, or talk to it in Chat."

        return self.queue.submit(f"{'Resume' if resume else 'Run'} {name}", "run", work)

    def _describe_rest(self, name: str) -> str:
        if partial_folder(self.workspace.path("runs", name)).exists():
            return "Its finished stages are kept: resume or discard it in Results."
        return "No stage was finished, so nothing is kept."

    def read_run(self, name: str) -> Run:
        """Return the record of a finished run. Raises UserError if there is none of that name."""
        if name not in self.workspace.list_runs():
            raise UserError(f"{name or 'no name'}: choose a finished run")
        file = self.workspace.path("runs", name) / "run.json"
        try:
            return Run.model_validate_json(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"runs/{name}/run.json cannot be read ({type(error).__name__}); run it again") from error

    # -------------------------------------------------------------------------------------- answers
    def start_answers(self, session: str, name: str, member: int, asked: Sequence[Asked], limits: AnswerLimits) -> int:
        """Put answers into the queue, and stop those that this session is being given. Returns their job.

        name: a finished run, or a model, which has no plan. member: of the run's front; 0 for the run's own plan.
        asked: what to answer, and at which strength; all are written at the same time, token by token in turn.
        """
        source, plan = self._find_voice(name, member)
        self.stop_answer(session)

        def work(job: Job) -> str:
            dial = self.held.get(source, plan)
            answers = [dial.stream(one.turns, one.strength, limits) for one in asked]
            for _ in zip_longest(*answers):
                job.say(tuple(Written(answer.text, bool(answer.ended)) for answer in answers))
            job.say(tuple(Written(answer.text, True) for answer in answers))
            return _describe_limits(answers, limits)

        number = self.queue.submit(f"Answer from {name}", "answer", work)
        self._answering[session] = number
        return number

    def stop_answer(self, session: str) -> None:
        """Stop the answer that a session is being given, if there is one."""
        if session in self._answering:
            self.queue.stop(self._answering.pop(session))

    def _find_voice(self, name: str, member: int) -> tuple[str, str]:
        """Return the source of the model and the folder of the plan. Raises UserError if either is not there."""
        if name not in self.workspace.list_runs():
            return find_model(self.workspace, self.models, name), ""
        source = find_model(self.workspace, self.models, self.read_run(name).source["id"])
        return source, str(self._plan_folder(name, member))

    def _plan_folder(self, name: str, member: int) -> Path:
        if not member:
            return self.workspace.path("runs", name)
        if (plan := self._member(name, member).plan) is None:
            raise UserError(f"{name}, member {member}: it has only a recipe; run that in Results to have a plan")
        return plan

    def _member(self, name: str, number: int) -> FrontMember:
        for member in self.workspace.list_front(name):
            if member.number == number:
                return member
        raise UserError(f"{name}: its front has no member {number}")

    def is_last_turn(self, session: str) -> bool:
        """Wait a moment; return whether the session has not turned its dial again in it, so that this turn counts."""
        turn = self._turns[session] = self._turns.get(session, 0) + 1
        time.sleep(SETTLE)
        return self._turns[session] == turn

    # -------------------------------------------------------------------------------------- exports
    def start_export(self, name: str, member: int, form: str) -> int:
        """Put the saving of a run's plan, or of a member of its front, into the queue; return its job."""
        check_form(form)
        run, (source, plan) = self.read_run(name), self._find_voice(name, member)
        export = self.workspace.new_name("exports", f"{name}{f'-member-{member}' if member else ''}-{form}")

        def work(job: Job) -> str:
            dial, out = self.held.get(source, plan), self.workspace.path("exports", export)
            record = describe_member(run, member, dial) if member else run
            save(dial.subject, dial.plan, record, out, cast(Form, form))
            return f"exports/{export} is saved, reloaded and scored again."

        return self.queue.submit(f"Export {export}", "export", work)

    def close(self) -> None:
        """Stop all jobs and let the model go."""
        self.queue.close()
        self.held.release()


def describe_member(run: Run, member: int, dial: Dial) -> Run:
    """Return the record of a run for another plan of its front, which was not measured on report prompts."""
    update: dict[str, Any] = {"before": {}, "after": {}, "change": {}, "optimism": {}, "passes": (), "saved": {}}
    update["coverage"] = summarize_plan_coverage(dial.subject, dial.plan)
    return run.model_copy(update={**update, "search": {**run.search, "member": member}})


def _describe_limits(answers: Sequence[Answer], limits: AnswerLimits) -> str:
    """Return what was left out of the answers or before them, or '' for nothing."""
    forgotten = max(answer.left_out for answer in answers)
    notes = [f"the {forgotten} oldest turns no longer fit"] if forgotten else []
    notes += [f"cut off at {limits.tokens} tokens"] if any(answer.ended == "limit" for answer in answers) else []
    return "; ".join(notes)


def _method_name(method: str) -> str:
    return Path(method).stem
