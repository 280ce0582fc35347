"""Plug-ins: Python files that register steps of one's own, and installed packages that do.

A file comes by ``--plugin FILE.py`` or `load_plugin`. A package names its module in the entry-point group
``obliteratus.steps``, and is imported when a step is first looked up.
"""

from __future__ import annotations

import hashlib
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from obliteratus.core.errors import UserError

GROUP = "obliteratus.steps"
"""Entry points of packages whose import registers steps."""

_registered: list[str] = []  # every step that was ever registered, in order
_files: dict[Path, str] = {}  # plug-in files that were loaded → SHA-256 of their text
_packages: dict[str, str] = {}  # packages whose entry points were loaded → version
_looked = False


def note_registered(step: str) -> None:
    """Remember that a step was registered."""
    _registered.append(step)


def load_plugin(file: str | Path) -> tuple[str, ...]:
    """Run a Python file that registers steps, and return what it registered.

    A file that has changed since is run again, and one that has not is left. Raises UserError, with the line, for a
    file that is missing, cannot be run, or registers nothing.

    >>> ob.load_plugin("loudest.py")
    ("distill step 'loudest'",)
    """
    path = check_plugin_file(file)
    digest, begun = hashlib.sha256(path.read_bytes()).hexdigest(), len(_registered)
    if _files.get(path) != digest:
        _run_file(path, str(file))
        if len(_registered) == begun:
            raise UserError(f'{file}: it registers no step; put @ob.extractors.register("name") before a function')
        _files[path] = digest
    return tuple(_registered[begun:])


def check_plugin_file(file: str | Path) -> Path:
    """Return the absolute path of a plug-in. Raises UserError if there is no such file."""
    path = Path(file).resolve()
    if path.suffix != ".py" or not path.is_file():
        raise UserError(f"{file}: this plug-in does not exist; give a Python file (.py) that registers steps")
    return path


def _run_file(path: Path, shown: str) -> None:
    """Import a file as a module of its own name. Raises UserError, with the line, if it fails."""
    name = f"obliteratus_plugin_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    module = ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module  # dataclasses and annotations look their module up
    try:
        # No loader of Python's: it may take byte code of an earlier text, and would leave some beside the file.
        exec(compile(path.read_bytes(), str(path), "exec"), vars(module))
    except UserError:
        raise
    except Exception as error:  # a file of the user's may fail in any way
        raise UserError(f"{_find_line(error, path, shown)}: the plug-in fails ({_describe(error)}); mend it") from error


def _find_line(error: Exception, path: Path, shown: str) -> str:
    """Return the file and the line in it at which it failed."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f"{shown}:{error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return f"{shown}:{lines[-1]}" if lines else shown


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"


def load_packages() -> None:
    """Import the installed packages that register steps, once. Raises UserError for one that cannot be imported."""
    global _looked
    if _looked:
        return
    _looked = True
    from importlib.metadata import entry_points  # takes longer than all else that usage errors need

    for entry in entry_points(group=GROUP):
        _load_entry(entry)


def _load_entry(entry: Any) -> None:
    dist = entry.dist
    name, version = (dist.name, dist.version) if dist is not None else (entry.name, "")
    try:
        entry.load()
    except UserError:
        raise
    except Exception as error:  # a package of someone else's may fail in any way
        raise UserError(
            f"the plug-in '{entry.name}' of the package {name} cannot be imported ({_describe(error)}); mend or remove "
            "the package"
        ) from error
    _packages[name] = version


def list_plugin_files() -> tuple[str, ...]:
    """Return the paths of the files that were loaded, for other processes to load too."""
    return tuple(map(str, _files))


def describe_plugins() -> Iterator[tuple[str, str]]:
    """Yield what was loaded, and its version or hash, for the record of a run."""
    yield from ((f"plug-in {path.name}", f"sha256 {digest[:16]}") for path, digest in _files.items())
    yield from ((f"plug-in {name}", version) for name, version in _packages.items())
