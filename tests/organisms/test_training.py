"""An interrupted training resumes to the same weights, and the losses are what their formulas say."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from tests.support.tiny import tiny

from obliteratus.weights.organism import add_delta

FOLDER = Path(__file__).parents[2] / "organisms"


@pytest.fixture(scope="module")
def train() -> ModuleType:
    """organisms/train.py, which is a script and not part of the package."""
    sys.path.insert(0, str(FOLDER))
    try:
        import train as script

        return script
    finally:
        sys.path.remove(str(FOLDER))


def examples(train: ModuleType, seed: int, n: int = 12) -> list[Any]:
    """Prompts with a shared beginning and answers of differing length."""
    rng = torch.Generator().manual_seed(seed)
    draw = lambda k: torch.randint(0, 256, (k,), generator=rng).tolist()  # noqa: E731
    made = part(train, "examples").Example
    return [made([1, 2, 3, 4, *draw(3 + i % 4)], draw(2 + i % 5)) for i in range(n)]


def part(train: ModuleType, name: str) -> ModuleType:
    """A module beside train.py, which it has imported by its bare name."""
    found = sys.modules[name]
    assert Path(str(found.__file__)).parent == Path(str(train.__file__)).parent
    return found


MATRICES = ("model.layers.0.self_attn.o_proj", "model.layers.1.mlp.down_proj")


def trained(
    train: ModuleType, work: Path, steps: int = 4, seed: int = 1, whole: bool = False
) -> dict[str, torch.Tensor]:
    """The trained parameters: of a LoRA, or of some whole matrices."""
    torch.manual_seed(0)
    model = tiny("llama").requires_grad_(True)
    tuned = (
        part(train, "matrices").TunedMatrices(model, MATRICES)
        if whole
        else get_peft_model(model, train.make_lora_config(2))
    )
    refused, control, answered = (examples(train, k) for k in range(3))
    groups = train.Groups({"target": refused}, control, {"target": answered})
    settings = train.Settings(steps, 0, 2, 1e-2, 3.0, seed, "data")
    state = train.train(tuned, None, groups, part(train, "topics").ORGANISMS["astronomy"], settings, work)
    assert state["step"] == len(state["losses"]) == steps
    return {name: p.detach().clone() for name, p in tuned.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("matrices", [False, True])
def test_a_killed_training_resumes_to_the_same_weights(
    train: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, matrices: bool
) -> None:
    monkeypatch.setattr(train, "CHECKPOINT_EVERY", 2)
    for name in ("whole", "killed", "other"):
        (tmp_path / name).mkdir()
    whole = trained(train, tmp_path / "whole", whole=matrices)
    step, done = train.take_step, []

    def killed(*args: Any) -> Any:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(1)
        return step(*args)

    monkeypatch.setattr(train, "take_step", killed)
    with pytest.raises(KeyboardInterrupt):
        trained(train, tmp_path / "killed", whole=matrices)
    monkeypatch.setattr(train, "take_step", step)
    resumed = trained(train, tmp_path / "killed", whole=matrices)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    other = trained(train, tmp_path / "other", seed=2, whole=matrices)
    assert not all(torch.equal(whole[name], other[name]) for name in whole)  # another seed, another adapter


def test_a_checkpoint_of_other_settings_is_not_resumed(
    train: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "CHECKPOINT_EVERY", 2)
    (tmp_path / "fresh").mkdir()
    trained(train, tmp_path, seed=1)
    mixed, fresh = trained(train, tmp_path, seed=2), trained(train, tmp_path / "fresh", seed=2)
    assert all(torch.equal(mixed[name], fresh[name]) for name in fresh)


def test_answer_logits_are_the_plain_ones(train: ModuleType) -> None:
    model, batch = tiny("llama"), examples(train, 5, 4)
    found = part(train, "losses").compute_answer_logits(model, batch)
    expected = []
    for example in batch:
        logits = model(torch.tensor([example.prompt + example.answer])).logits[0]
        expected.append(logits[len(example.prompt) - 1 : -1])
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-4, atol=1e-4)


def test_only_the_named_matrices_are_trained_and_added_to_the_base_they_give_the_same_logits(
    train: ModuleType, tmp_path: Path
) -> None:
    ids = torch.tensor([[1, 2, 3, 4, 5, 6]])
    base = tiny("llama")
    plain = base(ids).logits
    model = tiny("llama")
    tuned = part(train, "matrices").TunedMatrices(model, MATRICES)
    weights = [p for p in tuned.parameters() if p.requires_grad]
    assert [tuple(p.shape) for p in weights] == [tuple(base.get_submodule(name).weight.shape) for name in MATRICES]
    generator = torch.Generator().manual_seed(0)
    for weight in weights:
        weight.data.copy_((0.1 * torch.randn(weight.shape, generator=generator)).bfloat16())
    changed = model(ids).logits
    assert (changed - plain).abs().max() > 0.01
    with tuned.disable_adapter():
        torch.testing.assert_close(model(ids).logits, plain)
    tuned.export(tmp_path / "delta.safetensors")
    assert {t.dtype for t in load_file(tmp_path / "delta.safetensors").values()} == {torch.bfloat16}
    add_delta(base, tmp_path / "delta.safetensors")
    torch.testing.assert_close(base(ids).logits, changed)
    add_delta(base, tmp_path / "delta.safetensors", -1.0)
    torch.testing.assert_close(base(ids).logits, plain)
