"""The tab of finished and interrupted runs: the page, the files, the front, and exports."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr

from obliteratus.core.choices import FORMS
from obliteratus.core.errors import UserError
from obliteratus.serve.ui.events import AT_ONCE
from obliteratus.serve.ui.pages import show_files, show_message, show_run
from obliteratus.serve.ui.workbench import Workbench

NO_RUN = "No run is finished yet. Start one in the tab Run."


def build(bench: Workbench) -> dict[Any, Any]:
    """Add the tab's components and what they do; return its lists, and what each offers at the moment."""
    space = bench.workspace
    run = gr.Dropdown([], value=None, label="Finished run", elem_id="run")
    page = gr.HTML(show_message(NO_RUN, "about"), elem_id="page", padding=False)
    files = gr.HTML(elem_id="files", padding=False)
    member = build_member("result-member")
    with gr.Accordion("Save in another form", open=False, elem_id="export"):
        exports = _build_export(bench, run, member)
    with gr.Accordion("Interrupted runs", open=False, elem_id="interrupted-runs"):
        interrupted = _build_interrupted(bench)
    run.change(
        lambda name: (*show_result(bench, name), offer_members(bench, name)),
        run,
        [page, files, member],
        **AT_ONCE,
    )
    return {run: space.list_runs, exports: space.list_exports, interrupted: space.list_interrupted}


def build_member(elem_id: str) -> Any:
    """Return the front picker: a list that is seen only where a run has a front."""
    label = "Plan: of the run, or another member of its front"
    return gr.Dropdown([("the plan that the run chose", 0)], value=0, label=label, visible=False, elem_id=elem_id)


def offer_members(bench: Workbench, name: str | None) -> Any:
    """Return the change of the front picker for a run."""
    members = bench.workspace.list_front(name) if name in bench.workspace.list_runs() else []
    known = bench.workspace.describe_front(name) if members and name else {}
    choices = [("the plan that the run chose", 0)]
    for one in members:
        kind = "" if one.plan else "recipe: "
        choices.append((f"{one.number}: {kind}{known.get(one.number, '')}".strip(": "), one.number))
    return gr.update(choices=choices, value=0, visible=bool(members))


def show_result(bench: Workbench, name: str | None) -> tuple[str, str]:
    """Return the page of a run and links to its files."""
    if not name:
        return show_message(NO_RUN, "about"), ""
    try:
        bench.read_run(name)
        return show_run(name), show_files("runs", name, bench.workspace.path("runs", name))
    except UserError as error:
        return show_message(str(error)), ""


def _build_export(bench: Workbench, run: Any, member: Any) -> Any:
    """Add the saving of a run's plan in another form; return the list of what was saved."""
    with gr.Row(equal_height=True):
        form = gr.Radio(list(FORMS), value="adapter", label="Form", elem_id="export-form")
        save = gr.Button("Save into the workspace", elem_id="export-save")
        make = gr.Button("Run this member's recipe", elem_id="run-member", visible=False)
    said = gr.HTML(elem_id="export-said", padding=False)
    exports = gr.Dropdown([], value=None, label="Saved before", elem_id="exports")
    files = gr.HTML(elem_id="export-files", padding=False)
    save.click(
        lambda name, number, kind: attempt(bench, lambda: bench.start_export(name or "", number, kind)),
        [run, member, form],
        said,
        **AT_ONCE,
    )
    make.click(
        lambda name, number: attempt(bench, lambda: bench.run_member(name or "", number)),
        [run, member],
        said,
        **AT_ONCE,
    )
    member.change(
        lambda name, number: gr.update(visible=bench.has_recipe(name or "", number)),
        [run, member],
        make,
        **AT_ONCE,
    )
    exports.change(lambda name: show_export(bench, name), exports, files, **AT_ONCE)
    return exports


def show_export(bench: Workbench, name: str | None) -> str:
    """Return links to the files of an export."""
    if name not in bench.workspace.list_exports() or name is None:
        return ""
    return show_files("exports", name, bench.workspace.path("exports", name))


def _build_interrupted(bench: Workbench) -> Any:
    """Add what can be done with runs that were stopped; return their list."""
    interrupted = gr.Dropdown([], value=None, label="Run whose finished stages are kept", elem_id="interrupted")
    with gr.Row():
        resume = gr.Button("Resume", elem_id="resume")
        discard = gr.Button("Discard", elem_id="discard", variant="stop")
    said = gr.HTML(elem_id="interrupted-said", padding=False)
    resume.click(lambda name: attempt(bench, lambda: bench.resume_run(name or "")), interrupted, said, **AT_ONCE)
    discard.click(
        lambda name: attempt(bench, lambda: bench.discard_run(name or ""), "It is removed."),
        interrupted,
        said,
        **AT_ONCE,
    )
    return interrupted


def attempt(bench: Workbench, act: Callable[[], object], done: str = "It is in the queue.") -> str:
    """Do something that may be refused, and return what to say."""
    try:
        act()
    except UserError as error:
        return show_message(bench.hide_places(str(error)))
    return show_message(done, "done")
