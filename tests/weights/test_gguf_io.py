"""GGUF files read and written anew, beside the gguf package's own reader; what is not edited keeps every byte."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as T
from tests.support.gguf_files import write_gguf

from obliteratus.core.errors import UserError
from obliteratus.weights.gguf_io import GgufTensor, read_gguf
from obliteratus.weights.rewrite_gguf import rewrite_gguf


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def test_it_reads_what_the_package_reads(file: Path) -> None:
    ours, theirs = read_gguf(file), gguf.GGUFReader(file)
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        entry = ours.tensors[tensor.name]
        assert (entry.type, list(entry.shape)) == (tensor.tensor_type, list(reversed(tensor.shape.tolist())))
        assert ours.read_rows(entry).tobytes() == tensor.data.tobytes()
        assert np.array_equal(ours.read_rows(entry, slice(1, 2)), ours.read_rows(entry)[1:2])
    fields = {key: field for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert ours.entries.keys() == fields.keys()
    assert all(ours.value(key) == field.contents() for key, field in fields.items())
    assert ours.value("no.such.key", 7) == 7


def test_nothing_edited_is_nothing_changed(file: Path, tmp_path: Path) -> None:
    rewrite_gguf(read_gguf(file), tmp_path / "same.gguf", {}, {})
    assert (tmp_path / "same.gguf").read_bytes() == file.read_bytes()


def test_new_and_retyped_tensors_stand_beside_the_old_ones(file: Path, tmp_path: Path) -> None:
    source, target = read_gguf(file), tmp_path / "new.gguf"
    name = "blk.1.ffn_down.weight"
    new = GgufTensor("blk.1.ffn_down.bias", (32,), T.F32)
    half = replace(source.tensors[name], type=T.F16)
    halves = source.read_rows(source.tensors[name]).view(np.float32).astype(np.float16)
    bias = np.arange(32, dtype=np.float32)
    edits = {name: lambda: [halves.view(np.uint8)], new.name: lambda: [bias.view(np.uint8)]}
    rewrite_gguf(source, target, edits, {name: half, new.name: new})
    before = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    after = {tensor.name: tensor for tensor in gguf.GGUFReader(target).tensors}
    assert list(after) == [*before, new.name]
    assert np.array_equal(after[name].data, halves)
    assert np.array_equal(after[new.name].data, bias)
    for key in before.keys() - {name}:
        assert after[key].data.tobytes() == before[key].data.tobytes(), key
    assert read_gguf(target).raw == source.raw


def test_pieces_of_another_size_are_our_mistake(file: Path, tmp_path: Path) -> None:
    source = read_gguf(file)
    with pytest.raises(ValueError, match=r"takes 7168 bytes, but its pieces take 3"):
        rewrite_gguf(source, tmp_path / "new.gguf", {"blk.1.ffn_down.weight": lambda: [np.zeros(3, np.uint8)]}, {})
    assert not list(tmp_path.iterdir())


def test_a_truncated_file_is_named_wherever_it_ends(file: Path, tmp_path: Path) -> None:
    data, cut = file.read_bytes(), tmp_path / "cut.gguf"
    for size in [5, 12, *range(24, len(data), len(data) // 23), len(data) - 1]:
        cut.write_bytes(data[:size])
        with pytest.raises(UserError, match="is truncated") as error:
            read_gguf(cut)
        assert "\n" not in str(error.value)
    cut.write_bytes(data)
    assert read_gguf(cut).tensors == read_gguf(file).tensors


def test_other_versions_and_unknown_types_are_refused(file: Path, tmp_path: Path) -> None:
    data, other = bytearray(file.read_bytes()), tmp_path / "other.gguf"
    other.write_bytes(data[:4] + (1).to_bytes(4, "little") + data[8:])
    with pytest.raises(UserError, match="GGUF version 1, and 2 and 3 are read"):
        read_gguf(other)
    source = read_gguf(file)
    name = next(iter(source.tensors)).encode()
    place = data.index(len(name).to_bytes(8, "little") + name) + 8 + len(name) + 4 + 16  # behind two dimensions
    data[place : place + 4] = (999).to_bytes(4, "little")
    other.write_bytes(data)
    with pytest.raises(UserError, match="has the unknown type 999"):
        read_gguf(other)
    other.write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match="is not a GGUF file"):
        read_gguf(other)
