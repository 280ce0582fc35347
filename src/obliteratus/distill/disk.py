"""Directions on disk: some take minutes to find, and a resumed run must not search again."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file, save_file

from obliteratus.core.types import Directions


def save_directions(found: Directions, folder: Path) -> None:
    """Write directions.safetensors and directions.json into an existing folder."""
    tensors = {"basis": found.basis, "score": found.score, "raw": found.raw}
    if found.covectors is not None:
        tensors["covectors"] = found.covectors
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, folder / "directions.safetensors")
    (folder / "directions.json").write_text(json.dumps({"unit": found.unit, "trace": found.trace}))


def load_directions(folder: Path) -> Directions:
    """What `save_directions` wrote."""
    data = json.loads((folder / "directions.json").read_text())
    return Directions(**load_file(folder / "directions.safetensors"), unit=data["unit"], trace=tuple(data["trace"]))
