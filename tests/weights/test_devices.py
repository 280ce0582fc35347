"""A model spread over devices, on disk in part, or sharded over processes gives what the plain one gives.

Run on CPUs alone, two processes over gloo: nothing here says anything about GPUs.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.tiny import tiny, tiny_config, tiny_tokenizer
from tests.support.two_processes import measured
from torch import Tensor
from typer.testing import CliRunner

from obliteratus.cli.app import app
from obliteratus.core.errors import UserError
from obliteratus.summon.load import open_subject
from obliteratus.weights.devices import check_tensor_parallel, gather_hook_inputs, gather_tensor, placement_arguments

CLOSE = 1e-4  # of sums that processes take in another order, fp32
KINDS = ["mixtral", "llama_biased"]  # stacks of experts; biases and tied ends. Others were run by hand


def saved(folder: Path, name: str, **changes: Any) -> Path:
    """A checkpoint of a tiny model."""
    tiny(name, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def launch(*program: str, processes: int = 2) -> subprocess.CompletedProcess[str]:
    """Under torchrun, at a port of its own choice."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *program], capture_output=True, text=True, timeout=100, env=env)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[dict[str, Any]]]]:
    """By model: its checkpoint, and what each of two processes measures of it. One launch serves all models."""
    models, out = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("out")
    folders = {name: saved(models / name, name) for name in KINDS}
    program = Path(__file__).parents[1] / "support" / "two_processes.py"
    done = launch(str(program), str(out), *map(str, folders.values()))
    assert done.returncode == 0, done.stderr[-2000:]
    return {
        name: (folder, [torch.load(out / f"{name}-rank{rank}.pt") for rank in (0, 1)])
        for name, folder in folders.items()
    }


def apart(found: dict[str, Any], plain: dict[str, Any]) -> list[str]:
    """Names of what is not the same."""

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, Tensor):
            return a.shape == b.shape and bool(torch.allclose(a, b, rtol=CLOSE, atol=CLOSE))
        if isinstance(a, list):
            return len(a) == len(b) and all(map(same, a, b))
        return bool(a == b)

    assert found.keys() == plain.keys()
    return [name for name, value in plain.items() if not same(found[name], value)]


# ------------------------------------------------------------------------------------------ device map
def on_disk(blocks: int) -> dict[str, str]:
    """The first block and the embedding in memory, all else on disk: what ``map`` gives where memory is small."""
    there = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "disk", "lm_head": "disk"}
    return there | {f"model.layers.{i}": "disk" if i else "cpu" for i in range(blocks)}


def test_a_model_on_disk_in_part_is_the_plain_model(tmp_path: Path) -> None:
    plain = open_subject(saved(tmp_path, "llama"))
    spread = open_subject(tmp_path, device=on_disk(plain.n_layers))
    away = [p.is_meta for p in spread.model.parameters()]
    assert any(away)
    assert not all(away)
    expected = measured(plain)
    assert not apart(measured(spread), expected)
    assert [n for n in expected if n not in ("plain", "digest") and _moved(expected[n], expected["plain"])]


def test_a_mixture_cannot_be_on_disk_in_part(tmp_path: Path) -> None:
    """transformers would save its experts anew there, in a folder that it is not given: refused, in one line."""
    with pytest.raises(UserError, match="offloaded to the disk"):
        open_subject(saved(tmp_path, "mixtral"), device=on_disk(2))


def _moved(found: Any, plain: Tensor) -> bool:
    return isinstance(found, Tensor) and found.shape == plain.shape and not torch.allclose(found, plain, atol=0.1)


# ------------------------------------------------------------------------------------ tensor parallelism
@pytest.mark.parametrize("name", KINDS)
def test_two_processes_give_what_one_gives(
    tmp_path: Path, name: str, sharded: dict[str, tuple[Path, list[dict[str, Any]]]]
) -> None:
    """Every rank: the digest, activations, answers, losses, whole weights, and first tokens under each kind of edit."""
    folder, by_rank = sharded[name]
    expected = measured(open_subject(folder))
    for found in by_rank:
        assert not apart(found, expected)
    rules = ["none", "columns", "rows", "heads", "heads under a rule", "readers", "embeddings"]
    assert all(_moved(expected[rule], expected["plain"]) for rule in rules)
    other = measured(open_subject(saved(tmp_path / "other", name, seed=1)))
    assert len(apart(other, expected)) == len(expected)  # the comparison can fail, of each of them


def test_tp_needs_torchrun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(UserError, match="not started by torchrun"):
        open_subject(saved(tmp_path, "llama"), device="tp")


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The options that one of two processes gets."""
    told = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    return placement_arguments("tp")


def test_tp_needs_a_plan_and_plain_weights(launched: dict[str, Any]) -> None:
    check_tensor_parallel(tiny_config("llama"), "x", launched, plain=True)
    with pytest.raises(UserError, match="no tensor-parallel plan for gpt2"):
        check_tensor_parallel(tiny_config("gpt2"), "x", launched, plain=True)
    with pytest.raises(UserError, match="needs safetensors of plain floats"):
        check_tensor_parallel(tiny_config("llama"), "x", launched, plain=False)
    check_tensor_parallel(tiny_config("gpt2"), "x", placement_arguments("map"), plain=False)


def test_processes_must_divide_the_heads(launched: dict[str, Any]) -> None:
    check_tensor_parallel(tiny_config("llama", num_key_value_heads=4), "x", launched, plain=True)
    with pytest.raises(UserError, match="num_key_value_heads is 1, not a multiple of 2"):
        check_tensor_parallel(tiny_config("llama", num_key_value_heads=1), "x", launched, plain=True)


@pytest.mark.parametrize(("device", "refused"), [("tp", True), ("cpu", False)])
def test_commands_take_no_parted_models(device: str, refused: bool) -> None:
    """Each process would write into the same folder."""
    asked = ["verify", "./nowhere", "--target", "t", "--control", "c", "--device", device]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 2
    assert ("the command line runs one process" in result.output) == refused


def test_a_plain_model_is_left_alone() -> None:
    model = tiny("llama")
    weight = model.model.layers[0].self_attn.o_proj.weight
    gather_hook_inputs(model)
    assert gather_tensor(weight) is weight
    assert not any(module._forward_pre_hooks for module in model.modules())
