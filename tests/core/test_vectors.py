"""Vectors of one's own as directions: every form of them, and what is wrong with those that do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tests.support.tiny import tiny_subject

from obliteratus.core.errors import UserError
from obliteratus.core.types import Directions, Subject
from obliteratus.excise.bake.gguf_adapter import _write_adapter

LAYERS, WIDTH = 3, 32


@pytest.fixture(scope="module")
def subject() -> Subject:
    return tiny_subject("llama")


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def test_rows_by_stream_are_normalized_and_keep_their_sign() -> None:
    rows = random(LAYERS + 1, WIDTH)
    found = Directions.from_vectors(rows)
    torch.testing.assert_close(found.basis[:, 0], rows / rows.norm(dim=1, keepdim=True))
    torch.testing.assert_close(found.raw, rows.norm(dim=1))
    assert found.score.tolist() == [1.0] * (LAYERS + 1)
    assert torch.equal(Directions.from_vectors(rows.double().numpy()).basis, found.basis)
    assert torch.equal(Directions.from_vectors(rows.half()).basis.dtype and found.basis, found.basis)


def test_one_vector_is_for_all_streams(subject: Subject) -> None:
    vector = random(WIDTH)
    found = Directions.from_vectors(vector, subject)
    assert found.basis.shape == (LAYERS + 1, 1, WIDTH)
    torch.testing.assert_close(found.basis[2, 0] * found.raw[2], vector)
    with pytest.raises(UserError, match="give the model too"):
        Directions.from_vectors(vector)


def test_vectors_by_block_are_of_what_it_leaves(subject: Subject) -> None:
    first, last = random(WIDTH), random(2, WIDTH)
    found = Directions.from_vectors({0: first, -1: last}, subject)
    assert found.basis.shape == (LAYERS + 1, 2, WIDTH)
    assert found.score.tolist() == [0.0, 1.0, 0.0, 1.0]  # streams: embeddings, then behind each block
    torch.testing.assert_close(found.basis[1, 0], first / first.norm())
    assert not found.basis[1, 1].any()
    inside = last @ found.basis[3].T @ found.basis[3]  # the rows span both vectors
    torch.testing.assert_close(inside, last)
    by_rows = Directions.from_vectors(random(LAYERS, WIDTH), subject)  # a row for each block and none for embeddings
    assert by_rows.score.tolist() == [0.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("prefix", ["direction.", "layer_", "blocks.", ""])
def test_a_safetensors_file(subject: Subject, tmp_path: Path, prefix: str) -> None:
    vectors = {block: random(WIDTH) + block for block in (0, 2)}
    save_file({f"{prefix}{block}": vector for block, vector in vectors.items()}, tmp_path / "v.safetensors")
    found = Directions.from_vectors(tmp_path / "v.safetensors", subject)
    assert torch.equal(found.basis, Directions.from_vectors(vectors, subject).basis)
    save_file({"vector": random(WIDTH)}, tmp_path / "one.safetensors")
    assert Directions.from_vectors(str(tmp_path / "one.safetensors"), subject).basis.shape[1] == 1


def test_a_control_vector_as_repeng_writes_it(subject: Subject, tmp_path: Path) -> None:
    """repeng's export_gguf, line by line."""
    vectors = {1: random(WIDTH).numpy(), 2: 3 * random(WIDTH).numpy()}
    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "controlvector")
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_uint32("controlvector.layer_count", len(vectors))
    for layer, vector in vectors.items():
        writer.add_tensor(f"direction.{layer}", vector.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = Directions.from_vectors(tmp_path / "v.gguf", subject)
    torch.testing.assert_close(found.raw[3], torch.tensor(vectors[2]).norm())
    assert torch.equal(found.basis, Directions.from_vectors(vectors, subject).basis)


def test_our_own_control_vector(subject: Subject, tmp_path: Path) -> None:
    _write_adapter(tmp_path / "v.gguf", "controlvector", "control_vector", {}, {"direction.1": random(WIDTH)})
    assert Directions.from_vectors(tmp_path / "v.gguf", subject).score.tolist() == [0.0, 0.0, 1.0, 0.0]
    _write_adapter(tmp_path / "m.gguf", "llama", "adapter", {}, {"direction.1": random(WIDTH)})
    with pytest.raises(UserError, match="holds 'llama' and no control vector"):
        Directions.from_vectors(tmp_path / "m.gguf", subject)


BAD: dict[str, tuple[Any, str]] = {
    "another width": (random(5), "of width 5, and the model has 4 of width 32"),
    "another width by block": ({0: random(5)}, r"block 0 has the shape \[1, 5\], and the model is 32 wide"),
    "no such block": ({7: random(WIDTH)}, "there is one of block 7, and the model has blocks 0 to 2"),
    "no such block from the end": ({-4: random(WIDTH)}, "one of block -4"),
    "integers": (torch.arange(WIDTH), "of type int64; give floats"),
    "NaN": (torch.full((WIDTH,), torch.nan), "NaN or Inf"),
    "zeros": (torch.zeros(WIDTH), "all of them are zero"),
    "nothing": ({}, "all of them are zero"),
    "four axes": (random(1, 1, 1, WIDTH), "they have the shape"),
    "dependent": ({1: torch.ones(2, WIDTH)}, "those of stream 2 depend on each other"),
    "another kind of file": ("v.npz", "not read from '.npz' files"),
    "no file": ("v.gguf", "v.gguf: this file of vectors does not exist"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_does_not_fit_is_said(subject: Subject, kind: str) -> None:
    vectors, message = BAD[kind]
    with pytest.raises(UserError, match=message):
        Directions.from_vectors(vectors, subject)


@pytest.mark.parametrize("suffix", [".safetensors", ".gguf"])
@pytest.mark.parametrize("data", [b"", b"GGUF\3\0\0\0", b"\xff" * 64, b"GGUF" + b"\xff" * 60])
def test_damaged_files(subject: Subject, tmp_path: Path, suffix: str, data: bytes) -> None:
    (tmp_path / f"v{suffix}").write_bytes(data)
    with pytest.raises(UserError, match=r"write it again|no control vector"):
        Directions.from_vectors(tmp_path / f"v{suffix}", subject)


def test_names_that_tell_no_block(subject: Subject, tmp_path: Path) -> None:
    save_file({"a": random(WIDTH), "b": random(WIDTH)}, tmp_path / "v.safetensors")
    with pytest.raises(UserError, match="the tensor 'a' names no block"):
        Directions.from_vectors(tmp_path / "v.safetensors", subject)
    save_file({"a.1": random(WIDTH), "b.1": random(WIDTH)}, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="several tensors are of one block"):
        Directions.from_vectors(tmp_path / "w.safetensors", subject)
