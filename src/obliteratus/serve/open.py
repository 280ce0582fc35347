"""What a conversation may be opened on: a model, the folder of a plan, or an adapter, with further plans beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from obliteratus.core.errors import UserError
from obliteratus.core.progress import note
from obliteratus.core.types import Plan, Subject
from obliteratus.excise.plan import FILES, check_fits, load_plan
from obliteratus.summon.load import assemble_subject, open_subject

CONFIG, RECORD, ADAPTER, ADAPTER_CONFIG = "config.json", "run.json", "adapter_model.safetensors", "adapter_config.json"


def open_for_chat(
    model: str, plans: Sequence[str | Path] = (), options: Mapping[str, Any] | None = None
) -> tuple[Subject, dict[str, Plan]]:
    """Return a model and the plans that a dial can turn on it, by the names of their folders.

    model: what `open_subject` opens, the output folder of a run in any form, or a PEFT adapter. The folder of a plan,
    or of an adapter with its plan, opens the model that it was made from, and its plan comes first. An adapter without
    a plan is merged into its model. options: of `open_subject`. Raises UserError.
    """
    options, folder = dict(options or {}), Path(model).expanduser()
    own = _is_plan_alone(folder)
    folders = [*([folder] if own else []), *(Path(plan).expanduser() for plan in plans)]
    loaded = {name: load_plan(path) for name, path in name_folders(folders).items()}
    if own:
        subject = open_subject(_read_base(folder), **options)
    elif _is_adapter(folder):
        subject = open_adapter(folder, options)
    else:
        subject = open_subject(model, **options)
        _tell_of_own_plan(folder, loaded)
    for name, plan in loaded.items():
        check_plan(subject, name, plan)
    return subject, loaded


def open_to_serve(
    model: str, plans: Sequence[str] = (), options: Mapping[str, Any] | None = None
) -> tuple[Subject, dict[str, Plan]]:
    """Return a model and its plans as `open_for_chat`; a plan may be given as ``NAME=FOLDER``. Raises UserError."""
    pairs = [("", plan) if Path(plan).expanduser().exists() else _split_name(plan) for plan in plans]
    named = {name: load_plan(Path(folder).expanduser()) for name, folder in pairs if name}
    subject, loaded = open_for_chat(model, [folder for name, folder in pairs if not name], options)
    for name, plan in named.items():
        if name in loaded or [own for own, _ in pairs].count(name) > 1:
            raise UserError(f"--plan {name}: two plans have this name; give one of them another, as NAME=FOLDER")
        check_plan(subject, name, plan)
    return subject, loaded | named


def _split_name(text: str) -> tuple[str, str]:
    """Return name and folder of ``NAME=FOLDER``; the name is '' if there is none. Raises UserError for a bad name."""
    name, sign, folder = text.partition("=")
    if not sign:
        return "", text
    if not (name and folder and name.isprintable() and name == name.strip()):
        raise UserError(f"--plan {text}: give the folder of a plan, or NAME=FOLDER")
    return name, folder


def load_plan_for(subject: Subject, folder: str | Path) -> tuple[str, Plan]:
    """Return the name and the plan of a folder. Raises UserError if there is none, or if it does not fit the model."""
    path = Path(folder).expanduser()
    plan = load_plan(path)
    name = next(iter(name_folders([path])))
    check_plan(subject, name, plan)
    return name, plan


def check_plan(subject: Subject, name: str, plan: Plan) -> None:
    """Raise UserError, with the plan's name, unless it fits the model."""
    try:
        check_fits(subject, plan)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def name_folders(folders: Sequence[Path]) -> dict[str, Path]:
    """Return folders by as much of the end of their path as tells them apart, such as ``lean``, or ``a/plan``."""
    parts = {path.resolve().parts: path for path in folders}  # a folder given twice is one

    def name(own: tuple[str, ...]) -> str:
        n = next(n for n in range(1, len(own) + 1) if sum(other[-n:] == own[-n:] for other in parts) == 1)
        return "/".join(own[-n:])

    return {name(own): path for own, path in parts.items()}


def open_adapter(folder: Path, options: Mapping[str, Any]) -> Subject:
    """Return the model of a PEFT adapter with the adapter merged into its weights. Raises UserError otherwise."""
    from peft import PeftModel  # imported here because it takes a second

    if not (folder / ADAPTER).is_file():
        raise UserError(f"{folder}: the adapter has no {ADAPTER}; only safetensors are read: save it in that form")
    base = open_subject(_read_base(folder), **options)
    try:
        model: Any = PeftModel.from_pretrained(base.model, str(folder)).merge_and_unload()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        cause = " ".join(str(error).split())[:200]
        raise UserError(f"{folder}: PEFT cannot merge this adapter into {base.source.id}: {cause}") from error
    note("adapter", "merged into its model; without a plan it has no strength to turn")
    model.eval().requires_grad_(False)
    return assemble_subject(model, base.tokenizer, id=str(folder), chat=base.chat)


def _is_plan_alone(folder: Path) -> bool:
    """Return whether a folder holds a plan and no model that it could be a part of."""
    return (folder / FILES[1]).is_file() and not (folder / CONFIG).is_file()


def _is_adapter(folder: Path) -> bool:
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / CONFIG).is_file()


def _read_base(folder: Path) -> str:
    """Return the model that a plan or adapter was made from. Raises UserError if its record does not name one."""
    name = RECORD if (folder / RECORD).is_file() or not _is_adapter(folder) else ADAPTER_CONFIG
    try:
        data = json.loads((folder / name).read_text(encoding="utf-8"))
        base = data["source"]["id"] if name == RECORD else data["base_model_name_or_path"]
    except FileNotFoundError as error:
        raise UserError(
            f"{folder}: no {name} says which model this plan was made for; give MODEL --plan {folder}"
        ) from error
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{folder / name} cannot be read ({error}); give the output folder of a run") from error
    if not isinstance(base, str) or not base:
        raise UserError(f"{folder / name} names no base model; give the base model, with --plan for a plan")
    return base


def _tell_of_own_plan(folder: Path, plans: Mapping[str, Plan]) -> None:
    """Say of a merged model whose plan lies beside it how its strength could be turned."""
    if not plans and (folder / FILES[1]).is_file() and (folder / RECORD).is_file():
        note("dial", f"the edit is in the weights; to turn its strength, chat {_read_base(folder)} --plan {folder}")
