"""What a run was made on, in words that name no machine and no person."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

from obliteratus.core.types import Subject

# Packages whose release may change a number: kernels, models, tokens, and what a search draws.
PACKAGES = ("obliteratus", "torch", "transformers", "tokenizers", "numpy", "safetensors", "peft", "optuna")
GB = 10**9


def describe_hardware(subject: Subject) -> dict[str, str]:
    """Return processor, its instructions and threads, main memory and the model's device."""
    device = subject.device
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": find_processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "memory": f"{round(psutil.virtual_memory().total / GB)} GB",
        "device": f"{device.type} {kind}".strip(),
    }


def find_processor() -> str:
    """Return the model name of the processor, or '' where the system does not tell."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def list_versions() -> dict[str, str]:
    """Return the release of Python and of each package of `PACKAGES` that is installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
