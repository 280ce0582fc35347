"""The files of a model folder beside its weights: tokenizer, templates, processors, code and license, copied as is.

Other programs, older releases of transformers among them, read these files as their authors wrote them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from obliteratus.core.errors import UserError
from obliteratus.core.progress import note
from obliteratus.weights.rewrite import copy_file
from obliteratus.weights.sources import locate

# Weights in other forms would be those of the unedited model.
WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".gguf", ".h5", ".msgpack", ".ot", ".npz"),
    *(".onnx", ".onnx_data", ".tflite", ".index.json"),
)
WRITTEN = ("config.json", "README.md", "adapter_config.json")
"""Files that are written anew, or would make the folder something else."""
RECORD = "run.json"
LEFT = (
    *(RECORD, "reproduce.json", "reproduction.json", "index.html", "answers.jsonl", "first_tokens.jsonl"),
    *("plan.json", "front.json", "front.png", "front", "analysis", "study.journal"),
)
"""What an earlier run left in the folder beside its record, and is no longer true."""


def find_side_folder(source: str, revision: str = "") -> Path | None:
    """Return the folder with a model's files beside its weights; None for a GGUF file, or if it no longer exists.

    Those of a hub id are downloaded whole, since loaders fetch only the ones that they use themselves.
    """
    try:
        origin = locate(source)
    except UserError:  # an invented name, or a folder that was removed
        return None
    if origin.gguf:
        return None
    if origin.local:
        return Path(origin.path)
    try:
        patterns = [f"*{suffix}" for suffix in WEIGHTS]
        return Path(snapshot_download(origin.path, revision=revision or None, ignore_patterns=patterns))
    except (HfHubHTTPError, OSError, ValueError) as error:
        note(
            "REBIRTH",
            f"{source}: its other files cannot be downloaded ({str(error)[:80]}); those in the cache are kept",
        )
    try:
        return Path(snapshot_download(origin.path, revision=revision or None, local_files_only=True))
    except (HfHubHTTPError, OSError, ValueError):
        return None


def list_side_files(folder: Path) -> Iterator[Path]:
    """Yield the files beside the weights, by their path in the folder. Hidden ones are left out."""
    left_out = {*WRITTEN, *(LEFT if (folder / RECORD).is_file() else ())}
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in inside.parts)
        if path.is_file() and not hidden and inside.parts[0] not in left_out and not path.name.endswith(WEIGHTS):
            yield inside


TOKENIZER_FILES = ("tokenizer*", "*.model", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json")


def has_tokenizer(names: Iterable[str]) -> bool:
    """Return whether a tokenizer's files are among these."""
    return any(fnmatch(name, pattern) for name in names for pattern in TOKENIZER_FILES)


def copy_side_files(source: Path, folder: Path) -> list[str]:
    """Copy all files beside the weights into a folder, and return their names."""
    names = []
    for inside in list_side_files(source):
        (folder / inside).parent.mkdir(parents=True, exist_ok=True)
        copy_file(source / inside, folder / inside)
        names.append(inside.as_posix())
    return names
