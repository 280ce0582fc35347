"""The SHA-256 that is taken while a file is written is that of the file."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from obliteratus.core.errors import UserError
from obliteratus.weights.rewrite import THREADED, copy_file, hash_file, write_atomically


def test_pieces_of_any_size_are_summed_in_their_order(tmp_path: Path) -> None:
    pieces = [bytes([i]) * size for i, size in enumerate([3, THREADED, 2 * THREADED + 1, 5, THREADED - 1, THREADED])]
    with write_atomically(tmp_path / "file") as out:
        assert [out.write(piece) for piece in pieces] == [len(piece) for piece in pieces]
        assert out.hexdigest() == hashlib.sha256(b"".join(pieces)).hexdigest()
    assert (tmp_path / "file").read_bytes() == b"".join(pieces)
    assert out.hexdigest() == hash_file(tmp_path / "file")


def test_a_copy_knows_its_own_sum_and_notices_another(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(bytes(range(256)) * 40_000)  # more than two chunks
    sum = copy_file(source, target)
    assert (sum, target.read_bytes()) == (hash_file(source), source.read_bytes())
    target.unlink()
    with pytest.raises(UserError, match="was altered"):
        copy_file(source, target, "0" * 64)
    assert not target.exists()
