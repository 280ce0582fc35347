"""All weights of a model in memory written to new files, under the names that the model's files have."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from obliteratus.core.progress import progress
from obliteratus.excise.bake.tensors import Lazy, bake_in_pieces
from obliteratus.weights.names import restore_names
from obliteratus.weights.safetensors_io import Pieces, write_index, write_shard

Restored = Callable[[str], Mapping[str, Tensor]]


def write_weights(
    model: Any, state: Mapping[str, Tensor], edits: Mapping[str, Lazy], folder: Path, max_shard: int
) -> None:
    """Write parameters to safetensors files of at most ``max_shard`` bytes, and their index if there are several.

    state: every parameter by its name in the model. edits: functions that compute those that are edited; each is called
    when its file is written, so that one of them is in memory at a time, and two where experts are stored one by one.
    """
    shapes = {name: restore_names(model, {name: value.to("meta")}) for name, value in state.items()}
    stored = {key: (name, like) for name, parts in shapes.items() for key, like in parts.items()}
    split = split_torch_state_dict_into_shards({k: like for k, (_, like) in stored.items()}, max_shard_size=max_shard)

    @lru_cache(maxsize=2)  # the files alternate between a stack of readers and one of writers
    def restore(name: str) -> Mapping[str, Tensor]:
        return restore_names(model, {name: edits[name]() if name in edits else state[name]})

    with progress("REBIRTH writes tensors", len(stored)) as advance:
        for file, keys in split.filename_to_tensors.items():
            plain, parts = dict[str, Tensor](), dict[str, Pieces]()
            for key in keys:
                name, like = stored[key]
                whole = len(shapes[name]) == 1
                plain[key] = state[name] if whole else like
                if not whole:
                    parts[key] = partial(_take, restore, name, key)
                elif name in edits:
                    parts[key] = partial(bake_in_pieces, edits[name])
            write_shard(folder / file, plain, parts)
            restore.cache_clear()
            advance(len(keys))
    if split.is_sharded:
        write_index(folder, split.tensor_to_filename, split.metadata["total_size"])


def _take(restore: Restored, name: str, key: str) -> Iterator[Tensor]:
    yield restore(name)[key]
