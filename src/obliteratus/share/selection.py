"""Which files of a run go to a hub: what it takes to use the result, and nothing with a prompt or an answer in it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from obliteratus.core.errors import UserError
from obliteratus.core.results import Run
from obliteratus.core.types import Prompt, PromptSet
from obliteratus.excise.plan import FILES as PLAN_FILES
from obliteratus.prompts import load_prompts
from obliteratus.rebirth.model_card import render_model_card
from obliteratus.rebirth.run_page import read_run
from obliteratus.report.hide import hide_private
from obliteratus.share.clean import clean_run
from obliteratus.share.model_files import PATTERNS, sum_file
from obliteratus.share.private import Private, collect_private
from obliteratus.share.recorded import PROMPTS
from obliteratus.share.reproduce_file import FILE as REPRODUCE
from obliteratus.share.reproduce_file import ReproduceFile, digest_group, parse_reproduce_file

CARD, RECORD = "README.md", "run.json"
TEXTS = ("index.html", "answers.jsonl", "first_tokens.jsonl", "front/*", "front.json", "analysis/*")
"""Files that show prompts with answers to them, or may."""
NEEDED = (*PATTERNS, *PLAN_FILES, "adapter_*", "*.gguf", CARD, RECORD, REPRODUCE)
"""Files without which the result cannot be used. Others are left out where they hold what is private."""
# Entries of a configuration that say where something lay on this machine.
PATH_KEYS = ("name_or_path", "_name_or_path", "base_model_name_or_path", "tokenizer_file", "vocab_file")


@dataclass(frozen=True)
class Upload:
    """One file that goes to the hub."""

    name: str
    path: Path
    """Where its bytes are: the file itself, or a copy without what is private."""

    @property
    def bytes(self) -> int:
        """Its size."""
        return self.path.stat().st_size


@dataclass(frozen=True)
class Selection:
    """What goes to the hub, and what does not."""

    uploads: tuple[Upload, ...]
    left_out: Mapping[str, str]
    """File → why it stays here."""
    run: Run
    """The record as it goes to the hub."""


def select_files(folder: Path, staging: Path, repo: str, prompts: bool = False, answers: bool = False) -> Selection:
    """Return what of a run's folder goes to the repository ``owner/name``.

    staging: folder for copies without what is private. prompts, answers: whether they may go too. Raises UserError if
    the folder holds no finished run, for answers without prompts, and if a file that the result needs holds what may
    not go.
    """
    run = read_run(folder)
    if not run.saved.get("files"):
        raise UserError(f"{folder}: this run saved nothing that could be pushed; give the folder of one with --out")
    if answers and not prompts:
        raise UserError("--with-answers: answers stand beside their prompts, and repeat them; add --with-prompts")
    private = collect_private(folder, run, prompts, answers)
    names = list(_list_names(folder))
    left_out = {name: why for name in names if (why := _explain_left_out(name, run, prompts and answers))}
    uploads, shown = [], clean_run(run)
    for name in (name for name in names if name not in left_out and name not in (CARD, RECORD)):
        path = _copy_without_paths(folder, name, staging, private, shown)
        if found := private.find(path):
            _refuse_needed(folder / name, found)
            left_out[name] = found
        else:
            uploads.append(Upload(name, path))
    uploads += _write_prompts(folder, run, staging) if prompts else []
    records = _write_records(shown, uploads, repo, staging)
    for record in records:
        _refuse_needed(folder / record.name, private.find(record.path))
    return Selection((*records, *uploads), left_out, shown)


def _list_names(folder: Path) -> Iterator[str]:
    return (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file())


def _explain_left_out(name: str, run: Run, texts: bool) -> str:
    """Return why a file stays here, or '' if it goes."""
    if any(fnmatch(name, pattern) for pattern in TEXTS):
        return "" if texts else "shows prompts and answers"
    known = name in run.saved["files"] or name in (CARD, RECORD, REPRODUCE)
    return "" if known else "is not part of the result"


def _refuse_needed(path: Path, found: str) -> None:
    if found and any(fnmatch(path.name, pattern) for pattern in NEEDED):
        raise UserError(
            f"{path}: this file {found}, and the result cannot be used without it; take that out of the file"
        )


# ------------------------------------------------------------------------------------------ copies
def _copy_without_paths(folder: Path, name: str, staging: Path, private: Private, run: Run) -> Path:
    """Return the file, or a copy of it if it says where something lay on this machine."""
    path = folder / name
    if path.name.endswith("config.json"):
        data = json.loads(path.read_text(encoding="utf-8"))
        if changed := _hide_paths(data, run.saved.get("base_model", {}).get("base_model", "")):
            path = _stage(staging, name, json.dumps(changed, indent=2, ensure_ascii=False).encode() + b"\n")
    cleaned = private.remove_paths(path)
    return path if cleaned is None else _stage(staging, name, cleaned)


def _hide_paths(config: Mapping[str, Any], base: str) -> dict[str, Any]:
    """Return a configuration without absolute paths in `PATH_KEYS`; empty if it has none. base: id on the hub or ''."""
    found = {
        key: value for key in PATH_KEYS if isinstance(value := config.get(key), str) and hide_private(value) != value
    }
    return {**config, **{key: base or hide_private(value) for key, value in found.items()}} if found else {}


def _stage(staging: Path, name: str, data: bytes) -> Path:
    path = staging / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def _write_records(run: Run, uploads: Sequence[Upload], repo: str, staging: Path) -> list[Upload]:
    """Write the card and the record with the sums of the files as they are uploaded."""
    sums = {
        upload.name: sum_file(upload.path).model_dump() for upload in uploads if upload.path.is_relative_to(staging)
    }
    files = {
        upload.name: run.saved["files"].get(upload.name) for upload in uploads if upload.name in run.saved["files"]
    }
    saved = {**run.saved, "files": {**files, **{name: sum for name, sum in sums.items() if name in files}}}
    run = run.model_copy(update={"saved": saved})
    reproducible = any(upload.name == REPRODUCE for upload in uploads)
    card = render_model_card(run, repo, reproducible)
    return [
        Upload(CARD, _stage(staging, CARD, card.encode())),
        Upload(RECORD, _stage(staging, RECORD, run.model_dump_json(indent=1).encode())),
    ]


# ------------------------------------------------------------------------------------------ prompts
def _write_prompts(folder: Path, run: Run, staging: Path) -> list[Upload]:
    """Write the prompts of each group as JSON lines. Raises UserError if they are no longer those of the run."""
    then = parse_reproduce_file(folder / REPRODUCE, str(folder))
    found = _load_prompts(run, then)
    uploads = []
    for group, members in found.groups.items():
        if digest_group(members) != then.prompts[group].digest:
            raise UserError(
                f"{found.sources.get(group, group)}: these are no longer the {group} prompts of the run; restore the "
                "file, or leave out --with-prompts"
            )
        lines = "".join(json.dumps(_to_row(prompt), ensure_ascii=False) + "\n" for prompt in members)
        name = f"{PROMPTS}/{group}.jsonl"
        uploads.append(Upload(name, _stage(staging, name, lines.encode())))
    return uploads


def _load_prompts(run: Run, then: ReproduceFile) -> PromptSet:
    sources = {group: source for group, source in run.prompts.get("sources", {}).items() if group in then.prompts}
    if sources.keys() != then.prompts.keys():
        raise UserError("--with-prompts: the run did not record where its prompts are; leave it out")
    return load_prompts(**sources, column={group: one.column for group, one in then.prompts.items()})


def _to_row(prompt: Prompt) -> dict[str, Any]:
    """Return a prompt as the row of a file that is read as the same prompt."""
    rest = {"category": prompt.category, "split": prompt.split, "system": prompt.system}
    told = {key: value for key, value in rest.items() if value}
    if not prompt.history:
        return {"prompt": prompt.text, **told}
    turns = [{"role": turn.role, "content": turn.content} for turn in prompt.history]
    return {"messages": [*turns, {"role": "user", "content": prompt.text}], **told}
