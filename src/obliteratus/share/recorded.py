"""Find a run that is to be done again: its file, the plan beside it, and what only its own folder knows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import snapshot_download
from pydantic import ValidationError

from obliteratus.core.errors import UserError
from obliteratus.core.results import Run
from obliteratus.core.types import Plan
from obliteratus.excise.plan import FILES, load_plan
from obliteratus.share.clean import is_hidden
from obliteratus.share.hub import explain_hub_errors
from obliteratus.share.reproduce_file import FILE, ReproduceFile, parse_reproduce_file
from obliteratus.weights.rewrite import hash_file
from obliteratus.weights.sources import locate

HUB = "hub:"
PROMPTS = "prompts"
"""Folder beside the file with the prompts of each group, where they were shared."""


@dataclass(frozen=True)
class Recorded:
    """A run that can be done again."""

    name: str
    """As the user gave it."""
    file: ReproduceFile
    folder: Path
    """The folder that holds the file."""
    plan: Plan | None = None
    """The plan that came out, if it lies beside the file."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """Group → full path of its prompts, as the run's own record has it."""
    model: str = ""
    """Full path of the model, likewise."""


def find_recorded(source: str) -> Recorded:
    """Return a run by its file, its output folder, or ``hub:owner/name[@revision]``.

    Raises UserError if there is none, or if what is there is damaged.
    """
    path = fetch_recorded(source) if source.startswith(HUB) else Path(source)
    path = path / FILE if path.is_dir() else path
    file = parse_reproduce_file(path, source)
    run = _read_own_record(path.parent, file)
    return Recorded(
        name=source,
        file=file,
        folder=path.parent,
        plan=_read_plan(path.parent, file),
        sources={} if run is None else run.prompts.get("sources", {}),
        model="" if run is None else run.source["id"],
    )


def fetch_recorded(source: str) -> Path:
    """Return a folder with the file, the plan and the prompts that a repository has. Raises UserError."""
    name, _, revision = source.removeprefix(HUB).partition("@")
    with explain_hub_errors(source):
        wanted = [FILE, "run.json", *FILES, f"{PROMPTS}/*.jsonl"]
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=wanted))


def _read_plan(folder: Path, file: ReproduceFile) -> Plan | None:
    """Return the plan beside the file, or None if there is none. Raises UserError if it is another one's."""
    if not (folder / FILES[0]).is_file():
        return None
    for name, expected in file.plan.files.items():
        if not (folder / name).is_file() or hash_file(folder / name) != expected:
            raise UserError(
                f"{folder / name}: this is not the plan that {FILE} is about; keep both as the run left them, or take "
                f"{FILE} to a folder of its own"
            )
    return load_plan(folder)


def _read_own_record(folder: Path, file: ReproduceFile) -> Run | None:
    """Return run.json if it is of this run: only it knows where model and prompts were."""
    path = folder / "run.json"
    if not path.is_file():
        return None
    try:
        run = Run.model_validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, ValueError):
        return None
    return run if run.source.get("digest") == file.model.digest and run.after == file.after else None


# ------------------------------------------------------------------------------------------ where things are
def choose_model(recorded: Recorded, given: str) -> str:
    """Return the model to use: the one that is given, or that of the run. Raises UserError if it is not here."""
    known = given or recorded.model or recorded.file.model.id
    if given:
        return given
    if is_hidden(known):
        raise UserError(
            f"{recorded.name}: the model was a folder or file of another machine, {known}; give it with --model"
        )
    try:
        locate(known)
    except UserError as error:
        raise UserError(f"{recorded.name}: the model {known} is not here; give its place with --model") from error
    return known


def choose_sources(recorded: Recorded, given: Mapping[str, str | None]) -> dict[str, str]:
    """Return the source of each group: what is given, prompts beside the file, or those of the run.

    Raises UserError for a group whose prompts are not here.
    """
    return {group: given.get(group) or _find_source(recorded, group) for group in recorded.file.prompts} | {
        group: source for group, source in given.items() if source
    }


def _find_source(recorded: Recorded, group: str) -> str:
    shared = recorded.folder / PROMPTS / f"{group}.jsonl"
    if shared.is_file():
        return str(shared)
    known = recorded.sources.get(group) or recorded.file.prompts[group].source
    if is_hidden(known) or not (":" in known or Path(known).is_file()):
        raise UserError(f"{recorded.name}: the {group} prompts {known} are not here; give them with --{group}")
    return known


def is_shared(source: str) -> bool:
    """Return whether a source is a file of prompts that was shared beside a run, with columns of its own."""
    path = Path(source)
    return path.parent.name == PROMPTS and path.suffix == ".jsonl"
