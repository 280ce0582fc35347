"""``reproduce.json``: all that it takes to do a run again and to see whether the same came out.

It can be passed on. It holds digests of prompts and no text of theirs, and neither absolute paths nor keys.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from obliteratus.core.errors import UserError
from obliteratus.core.registry import explain_validation_error
from obliteratus.core.results import Run, Score
from obliteratus.core.run_folder import write_atomic
from obliteratus.core.settings import FrozenModel, Recipe
from obliteratus.core.types import Plan, Prompt, PromptSet, Subject, digest_of
from obliteratus.excise.plan import FILES as PLAN_FILES
from obliteratus.excise.plan import plan_digest
from obliteratus.inference.determinism import DETERMINISM
from obliteratus.report.hide import hide_private
from obliteratus.share.clean import clean_recipe, name_source
from obliteratus.share.hardware import describe_hardware, list_versions
from obliteratus.share.model_files import FileSum, sum_model_files
from obliteratus.share.tolerances import PLAN_TOLERANCE, allowed_difference
from obliteratus.weights.sources import locate

FILE, VERSION = "reproduce.json", 1
LARGEST = 2**26  # bytes; a file with 10,000 shards and scores by 1,000 categories has less


class ModelRecord(FrozenModel):
    """The model that was edited."""

    id: str
    """As it was given; a path without its folders."""
    revision: str = ""
    made_as: str = ""
    """For an organism, the name of its folder, which holds a hash of its committed weights. Its files are made on each
    machine, where sums round differently."""
    quantization: str = ""
    dtype: str = ""
    digest: str
    """See `core.types.Source`. A plan with another one is refused."""
    files: dict[str, FileSum]


class PromptsRecord(FrozenModel):
    """The prompts of one group."""

    source: str
    """As it was given; a path without its folders, a data set on the hub with its commit."""
    column: str = ""
    prompts: int = Field(ge=1)
    digest: str


class Request(FrozenModel):
    """What was asked for beside model, prompts and recipe."""

    form: str = "plan"
    pick: str = "balanced"
    force: bool = False
    dtype: str = "auto"
    quantize: str = ""
    device: str = "auto"
    memory: str | None = None
    trust_remote_code: bool = False
    thinking: bool = False
    template: str = ""
    now: datetime
    """Date and time that chat templates print."""


class Fixed(FrozenModel):
    """What was fixed by ``--deterministic``; see `inference.determinism`."""

    threads: int = Field(ge=1)
    memory: int = Field(ge=0)
    not_deterministic: tuple[str, ...] = ()


class PlanRecord(FrozenModel):
    """The plan of the run."""

    digest: str
    edits: int
    files: dict[str, str]
    """SHA-256 of the files that hold it."""
    tolerance: float = Field(PLAN_TOLERANCE, ge=0)
    """Largest relative difference of an edit that counts as the same where the bits differ."""


class ReproduceFile(FrozenModel):
    """Everything in ``reproduce.json``."""

    version: int = VERSION
    model: ModelRecord
    prompts: dict[str, PromptsRecord]
    recipe: dict[str, Any]
    """As it was asked for: a search with its space, before measurements changed anything."""
    left_out: tuple[str, ...] = ()
    """Paths into the recipe of what was left out, because it holds prompts or answers."""
    seed: int
    request: Request
    deterministic: Fixed | None = None
    """None for a run without ``--deterministic``."""
    versions: dict[str, str]
    hardware: dict[str, str]
    plan: PlanRecord
    before: dict[str, Score]
    after: dict[str, Score]
    allowed: dict[str, float]
    """Score → largest difference that counts as the same."""


def make_reproduce_file(
    subject: Subject,
    prompts: PromptSet,
    columns: str | Mapping[str, str],
    recipe: Recipe,
    request: Request,
    run: Run,
    plan: Plan,
) -> ReproduceFile:
    """Return the file of a run.

    recipe: as it was asked for. columns: of the prompts, for all groups or by group. run, plan: what came out.
    """
    kept, left_out = clean_recipe(recipe)
    fixed = DETERMINISM.get()
    return ReproduceFile(
        model=describe_model(subject),
        prompts=describe_prompts(prompts, columns),
        recipe=kept,
        left_out=left_out,
        seed=recipe.seed,
        request=request,
        deterministic=None if fixed is None else Fixed(**vars(fixed)),
        versions=list_versions(),
        hardware=describe_hardware(subject),
        plan=describe_plan(plan, run),
        before=run.before,
        after=run.after,
        allowed={name: allowed_difference(score) for name, score in {**run.before, **run.after}.items()},
    )


def describe_model(subject: Subject) -> ModelRecord:
    """Return the record of a model, with the sums of its files."""
    source = subject.source
    return ModelRecord(
        id=hide_private(source.id),
        revision=source.revision,
        made_as=find_made_as(source.id),
        quantization=source.quantization,
        dtype=source.dtype,
        digest=source.digest,
        files=sum_model_files(source.id, source.revision),
    )


def find_made_as(source: str) -> str:
    """Return the name of an organism's folder, or '' for any other model."""
    return Path(locate(source).path).name if source.startswith("organism:") else ""


def describe_plan(plan: Plan, run: Run) -> PlanRecord:
    """Return the record of a plan that was saved."""
    sums = {name: run.saved["files"][name]["sha256"] for name in PLAN_FILES}
    return PlanRecord(digest=plan_digest(plan), edits=len(plan.edits), files=sums)


def describe_prompts(prompts: PromptSet, columns: str | Mapping[str, str] = "") -> dict[str, PromptsRecord]:
    """Return the record of each group's prompts."""
    return {
        group: PromptsRecord(
            source=name_source(prompts.sources.get(group, "")),
            column=columns if isinstance(columns, str) else columns.get(group, ""),
            prompts=len(members),
            digest=digest_group(members),
        )
        for group, members in prompts.groups.items()
    }


def digest_group(members: tuple[Prompt, ...]) -> str:
    """Return a content hash of one group's texts, categories, splits and earlier turns, in their order."""
    return digest_of([[p.text, p.category, p.split, *p.context] for p in members])


# ------------------------------------------------------------------------------------------ on disk
def write_reproduce_file(made: ReproduceFile, folder: Path) -> None:
    """Write `FILE` into a folder."""
    write_atomic(folder / FILE, made.model_dump_json(indent=1) + "\n")


def parse_reproduce_file(path: Path, name: str) -> ReproduceFile:
    """Return what a file says. name: how messages call it.

    Raises UserError for a file that is missing, cut short, of an unknown version, or says something else.
    """
    try:
        data = json.loads(_read(path, name))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: the file is damaged or not whole ({str(error)[:80]}); get it again") from error
    if not isinstance(data, dict) or type(data.get("version")) is not int:
        raise UserError(f"{name}: this is no {FILE}, since it has no version; give the one that a run wrote")
    if data["version"] != VERSION:
        raise UserError(
            f"{name}: the file is of version {data['version']}, and this program reads version {VERSION}; install "
            f"the obliteratus that wrote it ({_find_writer(data)})"
        )
    try:
        return ReproduceFile.model_validate(data)
    except ValidationError as error:
        why = explain_validation_error(error)[:160]
        raise UserError(f"{name}: the file is not as a run writes it ({why}); get it again") from error


def _read(path: Path, name: str) -> str:
    if not path.is_file():
        raise UserError(f"{name}: there is no {FILE}; give the file, the output folder of a run, or hub:owner/name")
    if path.stat().st_size > LARGEST:
        raise UserError(f"{name}: this is no {FILE}, since it is larger than any; give the one that a run wrote")
    return path.read_text(encoding="utf-8")


def _find_writer(data: Mapping[str, Any]) -> str:
    versions = data.get("versions")
    return str(versions.get("obliteratus", "unknown"))[:20] if isinstance(versions, dict) else "unknown"
