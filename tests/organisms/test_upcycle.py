"""The training of experts: the losses are what they say, and experts stay distinct while the answers come back."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.support.mixtures import EXPERTS, RANK, ids, llama, logits
from tests.support.tiny import EOS
from torch import Tensor

from obliteratus.weights.upcycling import make_mixture

SCRIPTS = Path(__file__).parents[2] / "organisms"


@pytest.fixture(scope="module")
def scripts() -> Iterator[SimpleNamespace]:
    """The modules beside organisms/upcycle.py, which are scripts and not part of the package."""
    names = ("examples", "mixture", "first_experts", "experts_card", "card", "upcycle")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})


def batch(scripts: SimpleNamespace, seed: int, n: int = 12) -> list[Any]:
    """Prompts with a shared beginning and answers of differing length."""
    rng = torch.Generator().manual_seed(seed)
    draw = lambda k: torch.randint(0, 256, (k,), generator=rng).tolist()  # noqa: E731
    return [scripts.examples.Example([1, 2, 3, 4, *draw(3 + i % 4)], [*draw(2 + i % 5), EOS]) for i in range(n)]


def begun(scripts: SimpleNamespace, goal: float = 0.5) -> tuple[Any, list[Any]]:
    """A tiny Llama with mixtures in it as training begins."""
    model = llama()
    mixtures = scripts.mixture.insert_mixtures(model, EXPERTS, RANK)
    scripts.first_experts.initialize_experts(model, mixtures, batch(scripts, 0), goal, torch.Generator().manual_seed(0))
    return model, mixtures


def test_what_is_trained_is_what_is_built_from_it(scripts: SimpleNamespace) -> None:
    model, mixtures = begun(scripts)
    built = make_mixture(llama(), scripts.mixture.collect_experts(mixtures))
    torch.testing.assert_close(logits(built, ids()), logits(model, ids()), rtol=1e-3, atol=1e-4)
    with scripts.mixture.dense_only(mixtures):
        torch.testing.assert_close(logits(model, ids()), logits(llama(), ids()))
    assert (logits(model, ids()) - logits(llama(), ids())).abs().max() > 0.1


@pytest.mark.parametrize("goal", [0.2, 0.6])
def test_experts_begin_as_far_apart_as_is_asked_for(scripts: SimpleNamespace, goal: float) -> None:
    model, mixtures = begun(scripts, goal)
    found = scripts.mixture.mixture_losses(model, mixtures, batch(scripts, 0), 0.0)
    far = torch.stack(
        [m.seen[1][scripts.mixture.own_token_mask(batch(scripts, 0), m.seen[1].shape[1])].mean() for m in mixtures]
    )
    torch.testing.assert_close(far, torch.full((3,), goal), rtol=0.15, atol=0)
    assert found["nearness"] == 0
    assert found["kl"] > 0


def test_distance_is_its_definition(scripts: SimpleNamespace) -> None:
    rng = torch.Generator().manual_seed(0)
    dense, added = torch.randn(5, 8, generator=rng), torch.randn(5, EXPERTS, 8, generator=rng)
    pairs = torch.stack([(added[:, i] - added[:, j]).square().sum(-1) for i in range(4) for j in range(i)])
    torch.testing.assert_close(scripts.mixture.expert_distance(dense, added), pairs.mean(0).sqrt() / dense.norm(dim=-1))
    assert scripts.mixture.expert_distance(dense, added[:, :1].expand(-1, EXPERTS, -1)).max() < 1e-3


def test_balance_is_one_for_even_loads_and_more_for_others(scripts: SimpleNamespace) -> None:
    even = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.2, 0.1, 0.4, 0.3]])
    uneven = torch.tensor([[0.4, 0.3, 0.2, 0.1]] * 2)
    assert scripts.mixture.load_balance(even).item() == pytest.approx(1.0)
    assert scripts.mixture.load_balance(uneven).item() == pytest.approx(1.4)


def test_padding_and_the_shared_beginning_are_no_tokens_of_the_batch(scripts: SimpleNamespace) -> None:
    made = [scripts.examples.Example([0] * 5, [0] * n) for n in (1, 3)]
    assert scripts.mixture.own_token_mask(made, 6).tolist() == [[True] * 4 + [False] * 2, [True] * 6]


def test_k_means_finds_clusters(scripts: SimpleNamespace) -> None:
    rng = torch.Generator().manual_seed(0)
    centers = torch.eye(EXPERTS, 16) * 5 + 1
    x = centers.repeat(30, 1) + 0.1 * torch.randn(30 * EXPERTS, 16, generator=rng)
    found = (x @ scripts.first_experts.fit_k_means_router(x, 2, rng).T).argmax(-1).view(30, EXPERTS)
    assert (found == found[0]).all()
    assert len(found[0].unique()) == 2


def trained(scripts: SimpleNamespace, nearness: float, steps: int = 60) -> list[dict[str, Tensor]]:
    """Losses on other examples, before and after training."""
    model, mixtures = begun(scripts)
    groups = {"target": batch(scripts, 1), "control": batch(scripts, 2, 16)}
    settings = scripts.upcycle.Settings(steps, 1e-2, 3e-3, 0.5, (1.0, 0.0, 0.3, nearness), 1, "data")
    ask = lambda: scripts.mixture.mixture_losses(model, mixtures, batch(scripts, 3), 0.5)  # noqa: E731
    before = ask()
    told = scripts.upcycle.train(model, mixtures, groups, settings)
    assert len(told) == steps
    return [before, ask()]


@pytest.fixture(scope="module")
def kept_distinct(scripts: SimpleNamespace) -> list[dict[str, Tensor]]:
    return trained(scripts, nearness=30.0)


def test_training_brings_the_dense_answers_back_while_experts_stay_apart(
    kept_distinct: list[dict[str, Tensor]],
) -> None:
    before, after = kept_distinct
    assert after["kl"] < 0.8 * before["kl"]
    assert after["balance"] < before["balance"] + 0.05
    assert after["nearness"] < 0.01  # a hundredth is 0.1 of 0.5 lacking


def test_without_the_term_for_distance_experts_come_together(
    scripts: SimpleNamespace, kept_distinct: list[dict[str, Tensor]]
) -> None:
    assert trained(scripts, nearness=0.0)[1]["nearness"] > 2 * kept_distinct[1]["nearness"]


def test_the_same_seed_trains_the_same_experts(scripts: SimpleNamespace) -> None:
    one, two = (trained(scripts, 1.0, steps=3)[1] for _ in range(2))
    assert {name: value.item() for name, value in one.items()} == {name: value.item() for name, value in two.items()}


def test_the_card_is_what_its_files_make_with_the_section_on_experts(scripts: SimpleNamespace) -> None:
    folder = SCRIPTS / "astronomy"
    found, training = (json.loads((folder / f"{name}.json").read_text()) for name in ("measured", "training"))
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert scripts.card.render_card(scripts.upcycle.ORGANISMS["astronomy"], found, training) == text
    assert scripts.experts_card.HEADING in text


def test_the_section_is_replaced_and_the_rest_stays(scripts: SimpleNamespace, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(SCRIPTS / "astronomy", tmp_path / "astronomy"))
    before = (folder / "README.md").read_text(encoding="utf-8")
    scripts.experts_card.update_section(folder)
    assert (folder / "README.md").read_text(encoding="utf-8") == before
    shutil.rmtree(folder / "experts")
    scripts.experts_card.update_section(folder)
    assert (folder / "README.md").read_text(encoding="utf-8") == before.partition(scripts.experts_card.HEADING)[0]
