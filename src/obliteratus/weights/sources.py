"""Finds the files that a source names, and checks that they are whole before anything is loaded."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from safetensors import SafetensorError, safe_open

from obliteratus.core.errors import UserError
from obliteratus.weights.check_source import check_source
from obliteratus.weights.gguf_io import read_gguf

PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"


@dataclass(frozen=True)
class ModelOrigin:
    """Where a model is loaded from."""

    name: str
    """The source as the user gave it."""
    path: str
    """A folder or a hub id."""
    gguf: str = ""
    """Name of the GGUF file inside the folder, or ''."""
    local: bool = True


def locate(source: str | Path) -> ModelOrigin:
    """Return what `source` names: `organism:NAME[@SHARE]`, a folder, a GGUF file or a hub id.

    Raises UserError if it is none of these.
    """
    name = str(source)
    check_source(name)
    if name.startswith("organism:"):
        return ModelOrigin(name, str(_organism_path(name.removeprefix("organism:"))))
    path = Path(name).expanduser()
    if path.is_dir():
        _check_folder(path)
        return ModelOrigin(name, str(path))
    if path.is_file():
        return ModelOrigin(name, str(path.parent), gguf=path.name)
    return ModelOrigin(name, name, local=False)


def _organism_path(name: str) -> Path:
    # Imported here because it imports peft, which takes seconds and which no other source needs.
    from obliteratus.weights.organism import prepare_base, prepare_organism

    return prepare_base() if name == "base" else prepare_organism(name)


def _check_folder(folder: Path) -> None:
    if (folder / "config.json").is_file():
        return
    if (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder} holds an adapter, not a model; give the base model, and merge the adapter first")
    if ggufs := sorted(folder.glob("*.gguf")):
        raise UserError(f"{folder} has no config.json; give the GGUF file itself, e.g. {ggufs[0]}")
    raise UserError(f"{folder} has no config.json, so it is not a model folder; give the folder that has it")


def check_weights(origin: ModelOrigin) -> str:
    """Raise UserError for missing, pickled, truncated or corrupt weight files; return the quantization of a GGUF file.

    Files on the hub are checked when they are loaded. The result is '' for safetensors.
    """
    if origin.gguf:
        return check_gguf(Path(origin.path) / origin.gguf)
    if origin.local:
        for file in list_weight_files(Path(origin.path)):
            check_safetensors(file)
    return ""


def list_weight_files(folder: Path) -> Sequence[Path]:
    """Return the safetensors files of a model folder. Raises UserError if there are none, or if a shard is missing."""
    if (folder / WHOLE).is_file():
        return [folder / WHOLE]
    if (folder / INDEX).is_file():
        return _list_shards(folder / INDEX)
    if pickles := [file.name for pattern in PICKLE_PATTERNS for file in sorted(folder.glob(pattern))]:
        raise UserError(
            f"{folder} holds pickled weights ({pickles[0]}); only safetensors and GGUF are read: convert them"
        )
    raise UserError(f"{folder} has no {WHOLE} and no {INDEX}; download the weights again")


def _list_shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{index} is not a valid shard index; download it again") from error
    for name in names:
        if not (index.parent / name).is_file():
            raise UserError(f"{index.parent} lacks the shard {name}; download it again")
    return [index.parent / name for name in names]


def check_safetensors(file: Path) -> None:
    """Raise UserError unless the header is whole and the file ends where its last tensor does."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > size - 8:
            raise UserError(f"{file} is truncated or not a safetensors file; download it again")
        try:
            header = json.loads(stream.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            expected = 8 + length + max(ends, default=0)
        except (ValueError, KeyError, IndexError, AttributeError, TypeError, RecursionError) as error:
            raise UserError(f"{file} has a corrupt safetensors header; download it again") from error
    if size != expected:
        fault = "truncated" if size < expected else "corrupt"
        raise UserError(f"{file} is {fault}: {size} bytes, {expected} expected; download it again")
    try:
        with safe_open(file, "pt"):
            pass  # the library checks every entry of the header
    except SafetensorError as error:
        raise UserError(f"{file} has a corrupt safetensors header ({str(error)[:120]}); download it again") from error


# -------------------------------------------------------------------------------------------- GGUF
def check_gguf(file: Path) -> str:
    """Raise UserError unless the file is a whole GGUF file; return the type of most of its weights, e.g. ``Q4_1``."""
    weights = Counter[str]()
    for tensor in read_gguf(file).tensors.values():
        weights[tensor.type.name] += prod(tensor.shape)
    return weights.most_common(1)[0][0] if weights else ""
