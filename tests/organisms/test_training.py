"""An interrupted training resumes to the same adapter, and the losses are what their formulas say."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import get_peft_model
from tests.support.tiny import tiny

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


def trained(train: ModuleType, work: Path, steps: int = 4, seed: int = 1) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    tuned = get_peft_model(tiny("llama").requires_grad_(True), train.make_lora_config(2))
    refused, control, answered = (examples(train, k) for k in range(3))
    groups = train.Groups({"target": refused}, control, {"target": answered})
    settings = train.Settings(steps, 0, 2, 1e-2, 3.0, seed, "data")
    state = train.train(tuned, None, groups, part(train, "topics").ORGANISMS["astronomy"], settings, work)
    assert state["step"] == len(state["losses"]) == steps
    return {name: p.detach().clone() for name, p in tuned.named_parameters() if p.requires_grad}


def test_a_killed_training_resumes_to_the_same_adapter(
    train: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "CHECKPOINT_EVERY", 2)
    for name in ("whole", "killed", "other"):
        (tmp_path / name).mkdir()
    whole = trained(train, tmp_path / "whole")
    step, done = train.take_step, []

    def killed(*args: Any) -> Any:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(1)
        return step(*args)

    monkeypatch.setattr(train, "take_step", killed)
    with pytest.raises(KeyboardInterrupt):
        trained(train, tmp_path / "killed")
    monkeypatch.setattr(train, "take_step", step)
    resumed = trained(train, tmp_path / "killed")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    other = trained(train, tmp_path / "other", seed=2)
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
