"""Vectors of one's own as rows of directions: tensors, vectors by block, safetensors files, control vectors in GGUF."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from obliteratus.core.errors import UserError
from obliteratus.core.orthonormal import orthonormalize
from obliteratus.core.shapes import Float

Array = Tensor | NDArray[Any]
Vectors = Array | Mapping[int, Array] | str | Path
"""One vector, rows by stream, vectors by block, or a file of any of these."""
ARCHITECTURE = "controlvector"  # what llama.cpp and repeng call such a file
GIVE = "give a .safetensors file or a control vector in .gguf"


def stack_vectors(
    vectors: Vectors, size: tuple[int, int] | None
) -> tuple[Float[Tensor, "streams k width"], Float[Tensor, " streams"]]:
    """Return orthonormal rows for each stream, and the length of the first vector of each stream before that.

    size: blocks and width of the model, which a single vector and vectors by block need. Raises UserError for vectors
    that do not fit it or each other, hold NaN or Inf, are all zero, or depend on each other.
    """
    found = read_vectors(Path(vectors)) if isinstance(vectors, str | Path) else vectors
    rows = _stack_blocks(found, size) if isinstance(found, Mapping) else _expand(_to_tensor(found), size)
    _check(rows, size)
    lengths = rows.norm(dim=-1)
    basis = orthonormalize(torch.nn.functional.normalize(rows, dim=-1))
    if (dependent := (basis.norm(dim=-1) < 0.5) & (lengths > 0)).any():
        raise UserError(f"vectors: those of stream {int(dependent.nonzero()[0, 0])} depend on each other; give a basis")
    return basis, lengths[:, 0]


def _to_tensor(value: Array) -> Tensor:
    tensor = torch.as_tensor(value)
    if not tensor.is_floating_point():
        raise UserError(f"vectors: they are of type {str(tensor.dtype).removeprefix('torch.')}; give floats")
    return tensor.detach().to("cpu", torch.float32)


def _expand(found: Tensor, size: tuple[int, int] | None) -> Float[Tensor, "streams k width"]:
    """Return the rows of all streams from one vector, from one vector for each block or stream, or as they are."""
    if found.ndim == 1:
        return found.expand(_need(size)[0] + 1, 1, -1).contiguous()
    if found.ndim == 2 and size is not None and len(found) == size[0]:
        return torch.cat([torch.zeros_like(found[:1]), found])[:, None]  # nothing is known of the embeddings
    if found.ndim not in (2, 3):
        raise UserError(
            f"vectors: they have the shape {[*found.shape]}; give [width], [streams, width] or [streams, k, width]"
        )
    return found[:, None] if found.ndim == 2 else found


def _stack_blocks(found: Mapping[int, Array], size: tuple[int, int] | None) -> Float[Tensor, "streams k width"]:
    """Return the rows of all streams from vectors by block, with zeros where there is none."""
    blocks, width = _need(size)
    by_block = {block: torch.atleast_2d(_to_tensor(value)) for block, value in found.items()}
    rows = torch.zeros(blocks + 1, max((len(own) for own in by_block.values()), default=1), width)
    for block, own in by_block.items():
        if not -blocks <= block < blocks:
            raise UserError(f"vectors: there is one of block {block}, and the model has blocks 0 to {blocks - 1}")
        if own.ndim != 2 or own.shape[1] != width:
            raise UserError(f"vectors: block {block} has the shape {[*own.shape]}, and the model is {width} wide")
        rows[block % blocks + 1, : len(own)] = own
    return rows


def _need(size: tuple[int, int] | None) -> tuple[int, int]:
    if size is None:
        raise UserError(
            "vectors: how many streams there are is not known; give the model too, as in from_vectors(v, subject)"
        )
    return size


def _check(rows: Tensor, size: tuple[int, int] | None) -> None:
    streams, _, width = rows.shape
    if size is not None and (streams, width) != (size[0] + 1, size[1]):
        raise UserError(
            f"vectors: they are of {streams} streams of width {width}, and the model has {size[0] + 1} of width "
            f"{size[1]}"
        )
    if not torch.isfinite(rows).all():
        raise UserError("vectors: they hold NaN or Inf; make them again")
    if not rows.any():
        raise UserError("vectors: all of them are zero; give at least one that is not")


# ---------------------------------------------------------------------------------------------- files
def read_vectors(path: Path) -> Tensor | dict[int, Tensor]:
    """Return the vectors of a file: by block if their names are numbered (``direction.14``), or the file's only tensor.

    Raises UserError for a file that is missing, damaged or of another kind.
    """
    readers = {".safetensors": _read_safetensors, ".gguf": _read_control_vector}
    if path.suffix not in readers:
        raise UserError(f"{path}: vectors are not read from '{path.suffix}' files; {GIVE}")
    if not path.is_file():
        raise UserError(f"{path}: this file of vectors does not exist; {GIVE}")
    tensors = readers[path.suffix](path)
    if len(tensors) == 1 and not re.search(r"\d", next(iter(tensors))):
        return next(iter(tensors.values()))
    if "basis" in tensors:  # as a run keeps directions
        return tensors["basis"]
    by_block = {_read_block(name, path): tensor for name, tensor in tensors.items()}
    if len(by_block) < len(tensors):
        raise UserError(f"{path}: several tensors are of one block; keep one of each block")
    return by_block


def _read_block(name: str, path: Path) -> int:
    numbers = re.findall(r"\d+", name)
    if len(numbers) != 1:
        raise UserError(f"{path}: the tensor '{name}' names no block; name each by the block's number, as direction.14")
    return int(numbers[0])


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: this is no safetensors file ({str(error)[:80]}); write it again") from error


def _read_control_vector(path: Path) -> dict[str, Tensor]:
    """Return the tensors ``direction.N`` of a control vector, as repeng and llama.cpp write it."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        field = reader.fields.get("general.architecture")
        kind = "" if field is None else str(field.contents())
        tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    except (OSError, ValueError, LookupError, ArithmeticError) as error:
        raise UserError(f"{path}: this GGUF file is damaged ({str(error)[:80]}); write it again") from error
    if kind != ARCHITECTURE:
        raise UserError(f"{path}: this GGUF file holds '{kind}' and no control vector; {GIVE}")
    return {name: _to_tensor(data.copy()) for name, data in tensors.items()}
