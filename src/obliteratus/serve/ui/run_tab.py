"""The tab that starts runs: model, prompts, method, and what to save."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from obliteratus.core.choices import FORMS
from obliteratus.core.errors import UserError
from obliteratus.judge.behavior import load_behavior
from obliteratus.judge.behavior_file import list_behaviors
from obliteratus.pipeline.presets import list_methods
from obliteratus.pipeline.recipe import load_recipe
from obliteratus.serve.ui.events import AT_ONCE
from obliteratus.serve.ui.pages import show_message
from obliteratus.serve.ui.requests import RunRequest, check_changes, find_prompts
from obliteratus.serve.ui.workbench import Workbench

FIRST_MODEL, FIRST_METHOD = "organism:astronomy", "balanced"
OF_ORGANISM, OF_BEHAVIOR, UPLOADED = "A model organism's", "The behavior's own", "My files"


def build(bench: Workbench) -> None:
    """Add the tab's components and what they do."""
    with gr.Row():
        with gr.Column():
            model = _choose_model(bench)
            prompts = _choose_prompts(bench, model)
        with gr.Column():
            method = gr.Dropdown(list_methods(), value=FIRST_METHOD, label="Method", elem_id="method")
            about = gr.HTML(describe_method(FIRST_METHOD), elem_classes="about", padding=False)
            start = gr.Button("Start", variant="primary", elem_id="start")
            said = gr.HTML(elem_id="run-said", padding=False)
            more = _more_options()
    method.change(describe_method, method, about, **AT_ONCE)
    inputs = [model, *prompts, method, *more]
    start.click(lambda *values: start_run(bench, *values), inputs, said, **AT_ONCE)


def _choose_model(bench: Workbench) -> Any:
    models = bench.list_models()
    return gr.Dropdown(
        models,
        value=next(iter(bench.models), FIRST_MODEL),
        label="Model",
        info="Or type owner/name of the Hub. Folders: in the workspace's models/, or obliteratus ui FOLDER.",
        allow_custom_value=True,
        elem_id="model",
    )


def _choose_prompts(bench: Workbench, model: Any) -> list[Any]:
    """Add the choice of prompts; return the components that hold it."""
    behavior = gr.Dropdown(list_behaviors(), value="refusal", label="Look for, in answers", elem_id="behavior")
    kind = gr.Radio([OF_ORGANISM, OF_BEHAVIOR, UPLOADED], value=OF_ORGANISM, label="Prompts", elem_id="prompts-kind")
    organism = gr.Dropdown(bench.organisms, value="astronomy", label="Organism", elem_id="organism")
    with gr.Column(visible=False, elem_id="own-prompts") as own:
        said = gr.HTML(elem_id="upload-said", padding=False)
        target = _choose_file(bench, "target", "Prompts that show the behavior", said)
        control = _choose_file(bench, "control", "Prompts the model answers normally", said)
    model.change(lambda name: _same_organism(bench, name), model, organism, **AT_ONCE)
    kind.change(
        lambda k: (gr.update(visible=k == OF_ORGANISM), gr.update(visible=k == UPLOADED)),
        kind,
        [organism, own],
        **AT_ONCE,
    )
    return [behavior, kind, organism, target, control]


def _choose_file(bench: Workbench, group: str, label: str, said: Any) -> Any:
    with gr.Row(equal_height=True):
        files = bench.workspace.list_prompts()
        chosen = gr.Dropdown(files, value=None, label=label, elem_id=f"{group}-file", scale=3, min_width=180)
        upload = gr.UploadButton("Upload", elem_id=f"{group}-upload", scale=1, min_width=90, size="sm")
    keep: Callable[[str], Any] = lambda path: keep_upload(bench, path)  # noqa: E731 — a name for its type
    upload.upload(keep, upload, [chosen, said], **AT_ONCE)
    return chosen


def _more_options() -> list[Any]:
    with gr.Accordion("More options", open=False, elem_id="more"):
        name = gr.Textbox(label="Name of the run", placeholder="made from model and method", elem_id="run-name")
        form = gr.Radio(list(FORMS), value="merged", label="Save as", elem_id="form")
        changes = gr.Textbox(label="Changes of the recipe, one path=value a line", lines=2, elem_id="changes")
        trials = gr.Number(
            value=0, label="Trials of a search (0: as many as the recipe says)", precision=0, elem_id="trials"
        )
        force = gr.Checkbox(label="Edit even if the model does not show the behavior", elem_id="force")
    return [name, form, changes, trials, force]


def describe_method(name: str) -> str:
    """Return what a method is for, as HTML."""
    try:
        recipe = load_recipe(name)
    except UserError as error:
        return show_message(str(error))
    kind = " It is a search, which makes many trials." if recipe.search else ""
    return show_message(f"{recipe.about}.{kind}", "about")


def keep_upload(bench: Workbench, path: str) -> tuple[Any, str]:
    """Keep an uploaded prompt file; return the changes of its dropdown, and what to say."""
    try:
        name, count = bench.workspace.keep_prompts(Path(path), Path(path).name)
    except UserError as error:
        return gr.skip(), show_message(bench.hide_places(str(error)))
    files = bench.workspace.list_prompts()
    return gr.update(choices=files, value=name), show_message(f"{name}: {count} prompts", "done")


def start_run(bench: Workbench, *values: Any) -> str:
    """Start a run with what the components hold, and return what to say."""
    model, behavior, kind, organism, target, control, method, name, form, changes, trials, force = values  # or None
    try:
        sources = choose_sources(bench, behavior, kind, organism, (target or "", control or ""))
        request = RunRequest(
            model=model or "",
            target=sources[0],
            control=sources[1],
            behavior=behavior,
            method=method,
            changes=check_changes(changes or ""),
            trials=int(trials) if trials else None,
            form=form,
            force=bool(force),
        )
        number = bench.start_run(request, (name or "").strip())
    except UserError as error:
        return show_message(bench.hide_places(str(error)))
    ahead = sum(not state.finished for state in bench.queue.states() if state.number < number)
    return show_message(
        f"It waits for {ahead} other job{'s' if ahead > 1 else ''}." if ahead else "It has begun.", "done"
    )


def choose_sources(
    bench: Workbench, behavior: str, kind: str, organism: str, files: tuple[str, str]
) -> tuple[str, str]:
    """Return the sources of target and control prompts, '' for the behavior's own. Raises UserError if it has none."""
    if kind == OF_ORGANISM:
        source = find_prompts(bench.workspace, f"organism:{organism}")
        return source, source
    if kind == UPLOADED:
        return find_prompts(bench.workspace, files[0]), find_prompts(bench.workspace, files[1])
    if behavior in list_behaviors() and not load_behavior(behavior).head.target:
        raise UserError(f"{behavior} comes without prompts; choose an organism's, or upload your own")
    return "", ""


def _same_organism(bench: Workbench, model: str | None) -> Any:
    """Return the change of the organism whose prompts are used, when a model organism is chosen."""
    name = (model or "").removeprefix("organism:")
    return gr.update(value=name) if name in bench.organisms else gr.skip()
