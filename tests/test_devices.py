"""A model over several devices gives what it gives on one: a map with a part on disk, and parts of every matrix in two
processes that talk through gloo. On CPUs; nothing here says anything of GPUs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from parted import measured
from test_streamed_bake import stored
from tiny import MODELS

from obliteratus.errors import UserError
from obliteratus.summon.devices import LAUNCHED
from obliteratus.summon.open import open_subject

PROCESSES = 2
# fp32, summed in another order: of the largest number, as the issue asks
CLOSE = 1e-4


def alike(mine: Any, theirs: Any) -> bool:
    if isinstance(theirs, list):
        return len(mine) == len(theirs) and all(map(alike, mine, theirs))
    if not isinstance(theirs, torch.Tensor):
        return bool(mine == theirs)
    return mine.shape == theirs.shape and float((mine - theirs).abs().max()) <= CLOSE * float(theirs.abs().max())


def differing(mine: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    assert mine.keys() == theirs.keys(), mine.get("error", "other things were measured")
    return [name for name in theirs if not alike(mine[name], theirs[name])]


# ------------------------------------------------------------------------------------ a map of devices
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_map_with_a_part_on_disk(name: str, tmp_path: Path) -> None:
    folder = stored(tmp_path, name)
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu", "lm_head": "cpu"}
    layers = MODELS[name][1]["num_hidden_layers"]
    places |= {f"model.layers.{n}": "disk" for n in range(1, layers)} | {"model.norm": "disk"}
    spread = open_subject(folder, device=places)
    assert sum(p.is_meta for p in spread.model.parameters()) >= 5
    expected = measured(open_subject(folder))
    assert differing(measured(spread), expected) == []
    plain, edited = expected["plain"], expected["columns"]
    assert not alike(plain, edited)  # negative control: the edits show


# ------------------------------------------------------------------------------- parts in two processes
def launched(folder: Path, out: Path) -> list[dict[str, Any]]:
    """What each of two processes found."""
    out.mkdir()
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}"]
    program = str(Path(__file__).with_name("parted.py"))
    done = subprocess.run([sys.executable, *command, program, str(folder), str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(out / f"rank{rank}.pt", weights_only=False) for rank in range(PROCESSES)]


def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    folder = stored(tmp_path / "model", "qwen2")  # biases, and a head that is the table of embeddings
    expected = measured(open_subject(folder))
    for found in launched(folder, tmp_path / "out"):
        assert differing(found, expected) == []


def test_heads_that_cannot_be_shared_out_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(LAUNCHED, ("0", "0", "2", "localhost", "1"), strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="num_key_value_heads is 1, not a multiple of 2 processes"):
        open_subject(stored(tmp_path / "few", "llama", num_key_value_heads=1), device="tp")
    with pytest.raises(UserError, match="no tensor-parallel plan for gpt2"):
        open_subject(stored(tmp_path / "none", "gpt2"), device="tp")


def test_torchrun_has_to_start_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="was not started by torchrun"):
        open_subject(stored(tmp_path, "llama"), device="tp")
