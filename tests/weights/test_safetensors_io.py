"""Files written in pieces are what safetensors itself would read, and stacks are never held twice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.support.plans import PlanMaker
from tests.support.tiny import tiny_subject

from obliteratus.excise.bake.tensors import bake, bake_in_pieces
from obliteratus.weights.safetensors_io import DTYPE_NAMES, write_shard


def test_every_dtype_goes_to_disk_and_back(tmp_path: Path) -> None:
    tensors = {str(kind): (torch.arange(15).reshape(3, 5) % 7).to(kind) for kind in DTYPE_NAMES}
    tensors |= {"one": torch.tensor(3.5), "none": torch.empty(0, 4), "turned": torch.randn(4, 3).T}
    write_shard(tmp_path / "a.safetensors", tensors, {})
    found = load_file(tmp_path / "a.safetensors")
    assert set(found) == set(tensors)
    assert all(found[name].dtype == x.dtype and torch.equal(found[name], x) for name, x in tensors.items())


def test_pieces_stand_for_the_whole(tmp_path: Path) -> None:
    x = torch.randn(4, 2, 3)
    write_shard(tmp_path / "a", {"x": x, "y": x}, {"x": lambda: iter(2 * x)})
    found = load_file(tmp_path / "a")
    assert torch.equal(found["x"], 2 * x)
    assert torch.equal(found["y"], x)


def test_pieces_that_do_not_fit_are_noticed(tmp_path: Path) -> None:
    x = torch.randn(4, 2)
    with pytest.raises(ValueError, match="x takes 32 bytes, but its pieces take 24"):
        write_shard(tmp_path / "a", {"x": x}, {"x": lambda: x[:3]})
    with pytest.raises(ValueError, match=r"float64 instead of torch\.float32"):
        write_shard(tmp_path / "a", {"x": x}, {"x": lambda: [x.double()]})


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_a_stack_comes_one_expert_at_a_time(name: str, make_plan: PlanMaker) -> None:
    subject = tiny_subject(name)
    plan = make_plan(subject, ("expert.out",), norm="columns")
    for key, value in bake(subject, plan).items():
        parts = list(bake_in_pieces(value))
        whole = subject.model.get_parameter(key)
        stacked = whole.ndim == 3
        assert [part.shape for part in parts] == ([whole[0].shape] * 4 if stacked else [whole.shape])
        assert torch.equal(torch.stack(parts) if stacked else parts[0], value())
        assert len({part.data_ptr() for part in parts}) == len(parts)
        assert all(part.untyped_storage().nbytes() == part.nbytes for part in parts)  # no view of a copied stack
