"""Writes GGUF files anew: what is not edited is copied byte for byte, and a file appears whole or not at all."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from obliteratus.weights.gguf_io import MAGIC, PAD, GgufFile, GgufTensor, StoredBytes
from obliteratus.weights.rewrite import HashingReader, write_atomically

Bytes = Callable[[], Iterable[StoredBytes]]
"""Returns the bytes of a tensor in pieces, in order, when they are to be written. Pieces do not change afterwards."""


def rewrite_gguf(source: GgufFile, target: Path, edits: Mapping[str, Bytes], changed: Mapping[str, GgufTensor]) -> str:
    """Write a GGUF file anew and return its SHA-256: metadata and all tensors that are not edited are copied as is.

    edits: the new bytes of tensors. changed: shape and type of those that are new (they come last) or change their
    type. One piece is in memory at a time. Raises UserError if the disk is full or the source is truncated, ValueError
    if pieces make up another size.
    """
    tensors = place_tensors([*({**source.tensors, **changed}).values()], source.alignment)
    with write_atomically(target) as out, source.path.open("rb") as opened:
        reader = HashingReader(opened, "")
        head = encode_header(source, tensors)
        out.write(head)
        written = len(head)
        for tensor in tensors:
            out.write(PAD * (len(head) + tensor.start - written))
            written = len(head) + tensor.start + tensor.size
            if tensor.name not in edits:
                reader.skip(source.data + source.tensors[tensor.name].start - opened.tell())
                reader.copy(out, tensor.size)
                continue
            size = sum(out.write(piece.data.cast("B")) for piece in edits[tensor.name]())
            if size != tensor.size:
                raise ValueError(f"{tensor.name} takes {tensor.size} bytes, but its pieces take {size}")
        out.write(PAD * (-written % source.alignment))
    return out.hexdigest()


def place_tensors(tensors: Iterable[GgufTensor], alignment: int) -> list[GgufTensor]:
    """Return the tensors one after the other, each at a multiple of the alignment."""

    def place() -> Iterator[GgufTensor]:
        end = 0
        for tensor in tensors:
            start = -(-end // alignment) * alignment
            yield replace(tensor, start=start)
            end = start + tensor.size

    return list(place())


def encode_header(source: GgufFile, tensors: Iterable[GgufTensor]) -> bytes:
    """Return the header with the source's metadata and these tensors, padded to where the data begins."""
    listed = list(tensors)
    head = MAGIC + struct.pack("<IQQ", source.version, len(listed), len(source.entries)) + source.raw
    for tensor in listed:
        name = tensor.name.encode("utf-8", errors="surrogateescape")
        head += struct.pack(f"<Q{len(name)}sI", len(name), name, len(tensor.shape))
        head += struct.pack(f"<{len(tensor.shape)}QIQ", *reversed(tensor.shape), tensor.type.value, tensor.start)
    return head + PAD * (-len(head) % source.alignment)
