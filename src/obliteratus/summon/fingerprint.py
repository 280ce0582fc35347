"""Hashes of what a run depends on: the model's files before it is loaded, and how it was loaded.

An interrupted run goes on only with what it began with. A plan is bound to a model by another hash, `summon.digest`,
which is the same for every precision of one checkpoint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from obliteratus.core.progress import progress
from obliteratus.core.types import Subject, digest_of
from obliteratus.summon.chat_format import find_template
from obliteratus.weights.side_files import TOKENIZER_FILES
from obliteratus.weights.sources import INDEX, locate

TEMPLATE_FILES = ("chat_template*", "additional_chat_templates/*")
CONFIGURATION_FILES = ("config.json", "generation_config.json")
KINDS = {
    "weights": ("*.safetensors", INDEX),
    "configuration": CONFIGURATION_FILES,
    "tokenizer": TOKENIZER_FILES,
    "chat template": TEMPLATE_FILES,
}
"""Patterns of a model's files by what a message calls them."""
# Of larger files this much is hashed, in equal blocks from one end to the other: 2 GB take two seconds, which is less
# than loading them. Any training or edit changes values in every block.
MOST_HASHED, BLOCK = 2 * 10**9, 2**20
PACKAGES = ("obliteratus", "torch", "transformers")


def fingerprint_files(source: str | Path) -> dict[str, str]:
    """Return a hash of each kind of a local model's files, by what a message calls them. A hub id has none.

    Raises UserError if the source is no model.
    """
    origin = locate(source)
    if not origin.local:
        return {}
    folder = Path(origin.path)
    if origin.gguf:
        return {"weights": _hash_files([folder / origin.gguf])}
    return {
        kind: _hash_files(file for pattern in patterns for file in folder.glob(pattern))
        for kind, patterns in KINDS.items()
    }


def _hash_files(files: Iterable[Path]) -> str:
    """Return the hash of names and contents."""
    found = sorted(set(files))
    hashed = hashlib.blake2b(digest_size=8)
    share = MOST_HASHED // max(len(found), 1)
    blocks = {file: list(_block_starts(file.stat().st_size, share)) for file in found}
    with progress("FILES hashed, MB", sum(map(len, blocks.values()))) as advance:
        for file, starts in blocks.items():
            hashed.update(f"{file.name} {file.stat().st_size}".encode())
            with file.open("rb") as stream:
                for start in starts:
                    stream.seek(start)
                    hashed.update(stream.read(BLOCK))
                    advance(1)
    return hashed.hexdigest()


def _block_starts(size: int, most: int) -> Iterable[int]:
    """Return where the blocks begin that are read: all, or evenly spaced ones of ``most`` bytes together."""
    blocks = -(-size // BLOCK)
    kept = max(1, min(blocks, most // BLOCK))
    return (i * (blocks - 1) // max(kept - 1, 1) * BLOCK for i in range(kept)) if blocks else ()


def describe_loading(subject: Subject) -> dict[str, Any]:
    """Return how the model was loaded and is asked, by what a message calls it."""
    return {
        "revision": subject.source.revision,
        "dtype": subject.source.dtype,
        "quantization": subject.source.quantization,
        "chat template": digest_of(find_template(subject.tokenizer, subject.chat)),
        "thinking mode": subject.chat.thinking,
        "place of the weights": "disk" if subject.offloaded is not None else "memory",
        "versions": {name: version(name) for name in PACKAGES},
    }
