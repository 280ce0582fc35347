"""Look at what is installed here: packages, extras, devices, memory and cache. Only devices import torch."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
from packaging.requirements import Requirement

from obliteratus.weights.organism_files import BASE_FOLDERS, BASE_PACKAGE, get_cache_folder

EXTRAS: Mapping[str, str] = {
    "parquet": "Parquet prompt files",
    "quantized": "--quantize, and models stored in 4 or 8 bits",
    "search": "search, for methods that try many values",
    "gp": "search with Gaussian processes as its sampler",
    "ray": "study on a cluster",
    "postgres": "search with its study in PostgreSQL",
    "ui": "ui, the workbench in a browser",
    "serve": "serve, for OpenAI's clients",
    "yaml": "study --from-yaml",
    "bench": "bench, and the step benchmark of recipes",
    "inspect": "the model provider of Inspect",
    "notebooks": "to_pandas() and notebooks",
    "docs": "make docs, the site of these pages",
}
"""Extra → what needs it."""


@dataclass(frozen=True)
class Package:
    """A package that is wanted, and what is installed."""

    name: str
    wanted: str
    installed: str = ""
    """Its release; '' if it is missing."""
    fits: bool = False


@dataclass(frozen=True)
class Diagnosis:
    """What was found."""

    versions: Mapping[str, str]
    """Releases of this program and of Python."""
    packages: Sequence[Package]
    """What every command needs."""
    extras: Mapping[str, Sequence[Package]]
    """Extra → what is missing or too old for it."""
    devices: Mapping[str, str]
    memory: Mapping[str, int]
    """Bytes of main memory: ``total`` and ``available``."""
    cache: Mapping[str, Any]
    """Its folder, its bytes, the bytes that are free there, and whether it can be written."""
    base: str
    """Where the base model of the organisms comes from, for `demo`: ``cache``, ``package``, or '' for the hub."""
    problems: Sequence[str]
    """What keeps commands from running at all, each with what to do."""

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data."""
        return asdict(self)


def diagnose() -> Diagnosis:
    """Look at this installation and machine."""
    packages = check_requirements(requires("obliteratus") or [])
    devices, trouble = find_devices()
    cache, memory = look_at_cache(get_cache_folder()), psutil.virtual_memory()
    problems = [f"{_name_fault(one)}; pip install '{one.name}{one.wanted}'" for one in packages if not one.fits]
    problems += [trouble] if trouble else []
    if not cache["writable"]:
        problems.append(f"{cache['folder']}: the cache cannot be written; set OBLITERATUS_CACHE to another folder")
    return Diagnosis(
        versions={"obliteratus": version("obliteratus"), "python": platform.python_version()},
        packages=packages,
        extras={name: find_missing(name) for name in EXTRAS},
        devices=devices,
        memory={"total": memory.total, "available": memory.available},
        cache=cache,
        base=find_base(get_cache_folder()),
        problems=problems,
    )


# --------------------------------------------------------------------------------------------- packages
def check_requirements(lines: Sequence[str], extra: str = "") -> list[Package]:
    """Return the packages that an installation without extras needs, or those that one extra adds."""
    found = []
    for requirement in map(Requirement, lines):
        marker = requirement.marker
        always = marker is None or marker.evaluate({"extra": ""})
        if always if not extra else not always and marker is not None and marker.evaluate({"extra": extra}):
            found.append(_check_package(requirement))
    return found


def _check_package(requirement: Requirement) -> Package:
    wanted = str(requirement.specifier)
    try:
        installed = version(requirement.name)
    except PackageNotFoundError:
        return Package(requirement.name, wanted)
    return Package(requirement.name, wanted, installed, requirement.specifier.contains(installed, prereleases=True))


def find_missing(extra: str) -> list[Package]:
    """Return what is missing or too old for an extra."""
    return [one for one in check_requirements(requires("obliteratus") or [], extra) if not one.fits]


def _name_fault(package: Package) -> str:
    if not package.installed:
        return f"{package.name} is missing"
    return f"{package.name} {package.installed} is installed, and {package.wanted} is needed"


# ---------------------------------------------------------------------------------------------- machine
def find_devices() -> tuple[dict[str, str], str]:
    """Return what models can run on, with a description each, and what is wrong with torch, or ''."""
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a library that torch is linked with
        return {}, f"torch cannot be imported ({str(error)[:120]}); install it again"
    from obliteratus.share.hardware import find_processor

    threads = f"threads: {torch.get_num_threads()}, {torch.backends.cpu.get_cpu_capability()}"
    devices = {"cpu": f"{find_processor() or platform.machine()}, {threads}"}
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        name = torch.cuda.get_device_name(number)
        devices[f"cuda:{number}"] = f"{name}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free"
    if torch.backends.mps.is_available():
        devices["mps"] = "Apple GPU, which shares main memory"
    return devices, ""


def look_at_cache(folder: Path) -> dict[str, Any]:
    """Return the cache's folder and size, what is free there, and whether it can be written."""
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return {
        "folder": str(folder),
        "bytes": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink()),
        "free": shutil.disk_usage(place).free,
        "writable": place.is_dir() and os.access(place, os.W_OK | os.X_OK),
    }


def find_base(cache: Path) -> str:
    """Return where the base model of the organisms is: ``cache``, ``package``, or '' if it must come from the hub."""
    if any((cache / name).is_dir() for name in BASE_FOLDERS):
        return "cache"
    return "package" if find_spec(BASE_PACKAGE) else ""
