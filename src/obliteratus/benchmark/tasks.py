"""Find and load tasks by name: ours, those of YAML files, and those of the harness, whose data come from the hub."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from httpx2 import HTTPError

from obliteratus.benchmark.questions import TASKS, list_shipped_tasks
from obliteratus.core.errors import UserError
from obliteratus.core.noise import hushed_stderr

INSTALL = "pip install 'obliteratus[bench]'"
NAMES = re.compile(r"^(?:task|group): *['\"]?([\w.:-]+)", re.MULTILINE)
"""A task's or group's own name in its YAML file. Tags stand in lists, and are looked for by name."""
MAX_CAUSE = 160  # characters of another library's message, so that ours stays a line


@dataclass(frozen=True)
class LoadedTasks:
    """Tasks with their data, ready to be run."""

    names: tuple[str, ...]
    """As they were asked for."""
    loaded: Any
    """The harness's own dictionary of tasks and groups."""

    @property
    def tasks(self) -> dict[str, Any]:
        """The tasks by name, those of groups included."""
        return dict(self.loaded["tasks"])


def require_harness() -> None:
    """Raise UserError, with what to install, unless the harness is there."""
    if find_spec("lm_eval") is None:
        raise UserError(f"benchmarks are run by lm-evaluation-harness, which is not installed; {INSTALL}")


def split_names(names: str | Sequence[str]) -> tuple[str, ...]:
    """Return the task names of a list, or of a text with commas. Raises UserError if there are none, or one twice."""
    parts = names.split(",") if isinstance(names, str) else names
    found = tuple(filter(None, (part.strip() for part in parts)))
    if not found:
        raise UserError(f"tasks: none are given; give names with commas, such as {','.join(list_shipped_tasks())}")
    if twice := [name for name in found if found.count(name) > 1]:
        raise UserError(f"tasks: {twice[0]} is given twice; give each once")
    return found


def find_folders(names: Sequence[str], include: str = "") -> list[Path]:
    """Return the folders whose tasks have to be known to load these. Raises UserError for a task that there is not.

    include: a folder with further tasks. Without names of the harness's own its 14 000 files are not read.
    """
    require_harness()
    if include and not Path(include).is_dir():
        raise UserError(f"{include}: no such folder; give one with YAML files of tasks")
    own = [TASKS, *([Path(include)] if include else [])]
    known = set(list_shipped_tasks()) | set(_find_named(own[1:]))
    others = [name for name in names if name not in known and not _is_file(name)]
    return [*_find_harness_folders(others), *own]


def _is_file(name: str) -> bool:
    """Return whether a name is a YAML file. Raises UserError if it looks like one that is not there."""
    if not name.endswith((".yaml", ".yml")):
        return False
    if not Path(name).is_file():
        raise UserError(f"{name}: no such task file; give a YAML file of a task, or a task's name")
    return True


def _find_named(folders: Iterable[Path]) -> Iterator[str]:
    for folder in folders:
        for _, text in _read_files(folder):
            yield from NAMES.findall(text)


def _read_files(folder: Path) -> Iterator[tuple[Path, str]]:
    for file in sorted(folder.rglob("*.yaml")):
        yield file, file.read_text(encoding="utf-8", errors="replace")


def _find_harness_folders(names: Sequence[str]) -> list[Path]:
    """Return the folders of the harness that hold tasks, groups or tags of these names: a few of some 200.

    Reading the texts takes 5 s, where the harness parses all of them in 30 s.
    """
    if not names:
        return []
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    wanted = {
        name: re.compile(rf"^(?:(?:task|group|tag): *|\s*- +)['\"]?{re.escape(name)}['\"]?\s*$") for name in names
    }
    folders: dict[Path, None] = {}
    found, known = set[str](), set[str]()
    for file, text in _read_files(root):
        known.update(NAMES.findall(text))
        for name, pattern in wanted.items():
            if name in text and any(map(pattern.match, text.splitlines())):
                found.add(name)
                folders[root / file.relative_to(root).parts[0]] = None
    if missing := [name for name in names if name not in found]:
        raise UserError(_describe_unknown(missing[0], known | set(list_shipped_tasks())))
    return list(folders)


def _describe_unknown(name: str, known: set[str]) -> str:
    near = difflib.get_close_matches(name, sorted(known), n=1)
    hint = (
        f"did you mean '{near[0]}'?"
        if near
        else f"{', '.join(list_shipped_tasks())}, a YAML file, or `lm_eval ls tasks`"
    )
    return f"task '{name}' does not exist; {hint}"


@lru_cache(maxsize=4)  # a search scores each trial on the same tasks
def load_tasks(names: tuple[str, ...], include: str = "", shots: int | None = None) -> LoadedTasks:
    """Return tasks with their data. The harness's own are fetched from the hub, if they are not in its cache.

    names: of tasks, groups, tags or YAML files. shots: worked examples before each item; None leaves it to the task.
    Raises UserError for tasks that do not exist, whose data cannot be had, or that need what is not supported.
    """
    folders = find_folders(names, include)
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=folders, include_defaults=False)
    loaded: Any = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in names:
        for kind, members in _load(manager, name).items():
            loaded[kind] |= members
    for name, task in loaded["tasks"].items():
        _check_supported(name, task)
        _set_shots(task, shots)
    return LoadedTasks(names, loaded)


def _load(manager: Any, name: str) -> Any:
    """Return what the harness loads for one name."""
    try:
        with hushed_stderr():  # bars over a data set that is read from a file
            return manager.load([name])
    except (OSError, HTTPError) as error:
        raise UserError(
            f"task {name}: its data are not here and could not be fetched ({_shorten(error)}); connect to the hub"
        ) from error
    except ImportError as error:
        raise UserError(f"task {name}: {_shorten(error)}; install what it needs") from error
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"task {name} cannot be loaded ({_shorten(error)}); mend its file or leave it out") from error


def _shorten(error: Exception) -> str:
    """Return the first line of an error, or its type if it has no text."""
    text = " ".join(str(error).split())
    return text[:MAX_CAUSE] or type(error).__name__


def _check_supported(name: str, task: Any) -> None:
    if hasattr(task, "MULTIMODAL"):
        raise UserError(f"task {name}: it asks about images or sounds, and bench runs text alone; leave it out")
    if hasattr(task, "UNSAFE_CODE"):
        raise UserError(f"task {name}: it would run code that the model wrote; use `lm_eval` on the saved model for it")


def _set_shots(task: Any, shots: int | None) -> None:
    """Set the number of worked examples as the harness does: a task that says 0 keeps it."""
    own = task.get_config("num_fewshot")
    if shots is not None and own != 0:
        task.set_config(key="num_fewshot", value=shots)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
