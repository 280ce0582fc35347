"""What the browser can do: run, stop, resume, answer and export, all of it as jobs for one model in memory."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, cast

from obliteratus.core.chat import Turn
from obliteratus.core.errors import UserError
from obliteratus.core.results import Run
from obliteratus.core.run_folder import partial_folder
from obliteratus.core.types import Plan
from obliteratus.excise.plan import load_plan
from obliteratus.inference.stream import AnswerLimits
from obliteratus.rebirth.save import Form, check_form, save
from obliteratus.serve.dial import Dial
from obliteratus.serve.ui.job_queue import Job, JobQueue
from obliteratus.serve.ui.requests import RunRequest, check_names, find_model, load_request, save_request
from obliteratus.serve.ui.workspace import FrontMember, Workspace
from obliteratus.summon.coverage import summarize_plan_coverage
from obliteratus.summon.load import open_subject

RunMethod = Callable[[RunRequest, Path, bool, bool], None]
"""Runs a request: (request, output folder, whether to resume, whether only to check it). The command line's own."""


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
    models: Sequence[str] = ()
    """Sources named when the program was started."""
    opening: dict[str, Any] = field(default_factory=dict)
    queue: JobQueue = field(default_factory=JobQueue)

    def __post_init__(self) -> None:
        self.held = HeldModel(self.opening)
        self._answering: dict[str, int] = {}
        self._lock = Lock()

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
            except UserError as error:
                raise UserError(self.workspace.hide_root(str(error))) from error
            return f"{name} is done: see Results, or talk to it in Chat."

        return self.queue.submit(f"{'Resume' if resume else 'Run'} {name}", "run", work)

    def _describe_rest(self, name: str) -> str:
        if partial_folder(self.workspace.path("runs", name)).exists():
            return f"{name} was stopped. Its finished stages are kept: Results, Interrupted runs resumes or discards it."
        return f"{name} was stopped. No stage was finished, so nothing is kept."

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
    def start_answer(
        self, session: str, name: str, member: int, turns: Sequence[Turn], strength: float, limits: AnswerLimits
    ) -> int:
        """Put an answer into the queue, and stop the one that this session is being given. Returns its job.

        name: a finished run, or a model, which has no plan. member: of the run's front; 0 for the run's own plan.
        """
        source, plan = self._find_voice(name, member)
        self.stop_answer(session)

        def work(job: Job) -> str:
            answer = self.held.get(source, plan).stream(turns, strength, limits)
            for _ in answer:
                job.say(answer.text)
            notes = [f"the {answer.left_out} oldest turns no longer fit"] if answer.left_out else []
            notes += [f"cut off at {limits.tokens} tokens"] if answer.ended == "limit" else []
            return "; ".join(notes)

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
            raise UserError(f"{name}, member {member}: there is only its recipe; Results, Run this member makes its plan")
        return plan

    def _member(self, name: str, number: int) -> FrontMember:
        for member in self.workspace.list_front(name):
            if member.number == number:
                return member
        raise UserError(f"{name}: its front has no member {number}")

    # -------------------------------------------------------------------------------------- exports
    def start_export(self, name: str, member: int, form: str) -> int:
        """Put the saving of a run's plan, or of a member of its front, into the queue; return its job."""
        check_form(form)
        run, (source, plan) = self.read_run(name), self._find_voice(name, member)
        export = self.workspace.new_name("exports", f"{name}{f'-member-{member}' if member else ''}-{form}")

        def work(job: Job) -> str:
            dial, out = self.held.get(source, plan), self.workspace.path("exports", export)
            record = describe_member(run, member, dial) if member else run
            try:
                save(dial.subject, dial.plan, record, out, cast(Form, form))
            except UserError as error:
                raise UserError(self.workspace.hide_root(str(error))) from error
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


def _method_name(method: str) -> str:
    return Path(method).stem
