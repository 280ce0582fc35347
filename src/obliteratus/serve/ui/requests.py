"""What a browser may ask for: a run, checked so that it names no file outside the workspace."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from obliteratus.core.choices import Form
from obliteratus.core.errors import UserError, unknown_name
from obliteratus.judge.behavior_file import list_behaviors
from obliteratus.pipeline.presets import list_methods
from obliteratus.serve.ui.workspace import Workspace

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
ORGANISM = re.compile(r"organism:[A-Za-z0-9@._-]+")
BEHAVIOR = re.compile(r"behavior:[A-Za-z0-9_-]+")
# Recipe values that name no file and no address. What judges, and where, stays as it is.
OPEN_PATHS = ("excise.", "probe.", "distill.", "weigh.", "search.", "tune.", "passes=", "seed=", "split_by=")


class RunRequest(BaseModel):
    """A run or a search that was asked for in the browser."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    model: str
    target: str = ""
    """Source of the prompts, as of ``--target``; empty for the behavior's own examples."""
    control: str = ""
    behavior: str = "refusal"
    method: str = "balanced"
    """Name of a method, or the path of a recipe in a front."""
    changes: tuple[str, ...] = ()
    """As of ``--set``: path=value."""
    trials: int | None = Field(None, ge=1)
    """Of a search. None stands for the recipe's."""
    form: Form = "merged"
    force: bool = False
    """Whether to edit a model that does not show the behavior."""

    def overrides(self) -> list[str]:
        """Return the changes of the recipe, with what is looked for in answers."""
        return [*self.changes, f'judge.behavior="{self.behavior}"']

    def sources(self) -> dict[str, str | None]:
        """Return the prompt sources by group."""
        return {"target": self.target or None, "control": self.control or None}


def find_model(workspace: Workspace, named: Mapping[str, str], name: str) -> str:
    """Return the source that ``open_subject`` is given for what was chosen or typed.

    named: models that were named when the program was started, with their sources. Besides them there are organisms,
    folders in the workspace and names on the hub. Raises UserError for any other folder or file.
    """
    name = name.strip()
    if name in named:
        return named[name]
    if ORGANISM.fullmatch(name) or name in named.values():
        return name
    if name in workspace.list_models():
        return str(workspace.path("models", name))
    if Path(name).is_absolute() and workspace.holds(Path(name)) and Path(name).exists():
        return name  # how the record of a run names a model of the workspace
    if HUB_ID.fullmatch(name) and not Path(name).exists():
        return name
    raise UserError(
        f"{name[:60] or 'no model'}: choose a model of the list, or type organism:NAME, owner/name on the hub or a "
        "folder in the workspace's models/; other folders are named when the program is started: obliteratus ui FOLDER"
    )


def find_prompts(workspace: Workspace, name: str) -> str:
    """Return the source of prompts of that name: ``organism:NAME``, ``behavior:NAME`` or a file in ``prompts/``.

    Raises UserError for anything else.
    """
    if ORGANISM.fullmatch(name) or BEHAVIOR.fullmatch(name):
        return name
    if name in workspace.list_prompts():
        return str(workspace.path("prompts", name))
    raise UserError(f"{name[:60] or 'prompts'}: choose prompts of the list, or upload a file of them")


def check_names(request: RunRequest) -> None:
    """Raise UserError unless the method and the behavior are ones that come with the program."""
    if request.behavior not in list_behaviors():
        raise UserError(unknown_name("behavior", request.behavior, list_behaviors()))
    if request.method not in list_methods():
        raise UserError(unknown_name("method", request.method, list_methods()))


def check_changes(text: str) -> tuple[str, ...]:
    """Return the changes of a recipe in a text with one path=value a line.

    Raises UserError for one of a value that could name a file or an address.
    """
    changes = tuple(line.strip() for line in text.splitlines() if line.strip())
    for change in changes:
        if "=" not in change or not change.replace(" ", "").startswith(OPEN_PATHS):
            paths = ", ".join(path.rstrip(".=") for path in OPEN_PATHS)
            raise UserError(f"{change[:60]}: write path=value, as in excise.strength=0.7, with a path below {paths}")
    return changes


def save_request(workspace: Workspace, name: str, request: RunRequest) -> None:
    """Keep a request, so that the run can be resumed when the program was closed in between."""
    workspace.request_file(name).write_text(request.model_dump_json(indent=1), encoding="utf-8")


def load_request(workspace: Workspace, name: str) -> RunRequest:
    """Return the request of a run. Raises UserError if there is none."""
    file = workspace.request_file(name)
    if not file.is_file():
        raise UserError(f"{name}: it is not known what was asked for in this run; start a new one")
    return RunRequest.model_validate_json(file.read_text(encoding="utf-8"))
