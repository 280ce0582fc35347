"""KL-budgeted strength: the KL is the real one, the largest strength within it is found, and too little is said."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.support.executors import opened, silenced
from tests.support.plans import PlanMaker
from torch import Tensor

from obliteratus.core.errors import UserError
from obliteratus.core.run_folder import Store
from obliteratus.core.types import Edit, Plan, Prompt, PromptSet, Shift, Subject
from obliteratus.excise.kl_budget import find_largest_factor, limit_kl
from obliteratus.excise.live.hooks import applied
from obliteratus.inference.chat_template import render_prompts
from obliteratus.pipeline.recipe import load_recipe
from obliteratus.pipeline.run import run
from obliteratus.prompts import split_prompts

PROMPTS = tuple(Prompt(f"Say {x}.") for x in ("one", "two words", "a longer thing than that", "tree", "nine"))


@torch.no_grad()
def mean_kl(subject: Subject, plan: Plan, prompts: tuple[Prompt, ...]) -> float:
    """By definition, one prompt at a time, in float64."""
    values = []
    for row in render_prompts(subject, prompts):
        p = subject.model(torch.tensor([row])).logits[0, -1].double().log_softmax(-1)
        with applied(subject, plan):
            q = subject.model(torch.tensor([row])).logits[0, -1].double().log_softmax(-1)
        values.append(float((p.exp() * (p - q)).sum()))
    return sum(values) / len(values)


@pytest.mark.parametrize("share", [0.05, 0.5])
def test_the_largest_strength_within_the_budget(share: float, make_plan: PlanMaker) -> None:
    subject = opened("llama")
    plan = make_plan(subject)
    budget = share * mean_kl(subject, plan, PROMPTS)
    found, factor, cost = limit_kl(subject, Plan(), plan, PROMPTS, budget)
    assert 0 < factor < 1
    assert cost == pytest.approx(mean_kl(subject, found, PROMPTS), rel=1e-3)
    assert cost <= budget
    assert mean_kl(subject, plan.scaled(factor + 1 / 32), PROMPTS) > budget
    assert {e.strength for e in found.edits} == {factor}


def test_what_fits_stays_as_it_was(make_plan: PlanMaker) -> None:
    subject = opened("llama")
    plan = make_plan(subject, strength=0.7)
    found, factor, _ = limit_kl(subject, Plan(), plan, PROMPTS, 1e3)
    assert factor == 1
    for a, b in zip(found.edits, plan.edits, strict=True):
        assert torch.equal(a.basis, b.basis)
        assert a.strength == b.strength


def test_earlier_passes_count(make_plan: PlanMaker) -> None:
    subject = opened("llama")
    done, new = make_plan(subject, strength=0.5), make_plan(subject, seed=1)
    budget = 1.5 * mean_kl(subject, done, PROMPTS)
    found, factor, cost = limit_kl(subject, done, new, PROMPTS, budget)
    assert cost == pytest.approx(mean_kl(subject, done + found, PROMPTS), rel=1e-3)
    assert {e.strength for e in found.edits} == {factor}
    alone = limit_kl(subject, Plan(), new, PROMPTS, budget)[1]
    assert 0 < factor < alone


def test_a_budget_that_nothing_fits_is_the_users_to_mend(make_plan: PlanMaker) -> None:
    with pytest.raises(UserError, match=r"even 1/64 of the strength costs more; raise the budget"):
        limit_kl(opened("llama"), Plan(), make_plan(opened("llama")), PROMPTS, 1e-12)


@pytest.mark.parametrize("root", [0.03, 0.4, 0.99])
def test_bisection(root: float) -> None:
    asked: list[float] = []

    def costs(x: float) -> float:
        asked.append(x)
        return x**2

    factor, cost = find_largest_factor(costs, root**2, 6)
    assert root - 1 / 64 <= factor <= root
    assert cost == factor**2
    assert len(asked) == 7
    assert find_largest_factor(costs, 1.0, 6) == (1.0, 1.0)
    assert find_largest_factor(lambda x: 5.0, 1.0, 6) == (0.0, 0.0)


def test_shifts_weaken_and_masks_stay() -> None:
    subject = opened("llama")
    masks = silenced(subject)
    vector: Tensor = torch.ones(subject.width)
    plan = replace(masks, edits=(*masks.edits, Shift(masks.edits[0].site, vector)))
    found = plan.scaled(0.25)
    assert torch.equal(found.edits[-1].vector, 0.25 * vector)
    assert found.edits[:-1] == plan.edits[:-1]


def test_the_pipeline_keeps_to_it() -> None:
    subject = opened("llama")
    groups = {"target": "Tell me about {}.", "control": "How much is {} plus two?"}
    prompts = PromptSet({g: tuple(Prompt(t.format(i)) for i in range(40)) for g, t in groups.items()})
    scorers = [{"use": "behavior", "tokens": 4}, {"use": "first_token_kl"}]
    free, _, *_ = run(load_recipe("basic", {"verify": scorers}), subject, prompts, Store(), force=True)
    search = split_prompts(prompts, 0, force=True).search["control"]
    budget = 0.1 * mean_kl(subject, free, search)
    plan, _, *_ = run(
        load_recipe("basic", {"verify": scorers, "excise.kl_budget": budget}), subject, prompts, Store(), force=True
    )
    assert mean_kl(subject, plan, search) <= budget * 1.001
    assert all(isinstance(e, Edit) and 0 < e.strength < 1 for e in plan.edits)


def test_without_search_prompts_it_is_refused() -> None:
    fixed = {
        g: tuple(Prompt(f"{g} {i}", split="fit" if i else "report") for i in range(9)) for g in ("target", "control")
    }
    with pytest.raises(UserError, match="has no prompt in the search split"):
        run(load_recipe("basic", {"excise.kl_budget": 0.1}), opened("llama"), PromptSet(fixed), Store(), force=True)
