"""Fitting: a real gain, an untouched base, cached blocks, margins in order, and a run that resumes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.refuser import REFUSAL, asked, byte, refuser
from tests.support.tiny import tiny_subject
from tests.support.tuning import prompt_pairs, random_upper_plan

from obliteratus.causal.interventions import compute_answer_logits
from obliteratus.core.errors import UserError
from obliteratus.core.run_folder import Store
from obliteratus.core.settings import Tune
from obliteratus.core.types import Edit, Plan, Prompt, PromptSet, Subject
from obliteratus.excise.live.hooks import applied
from obliteratus.forecast.formula import describe_cost
from obliteratus.inference.chat_template import render_prompts
from obliteratus.judge.judge import Judge
from obliteratus.pipeline.recipe import load_recipe
from obliteratus.pipeline.run import run
from obliteratus.prompts import split_prompts
from obliteratus.tune import fit, targets
from obliteratus.tune.fit import CachedPairs, TunedPlan, TuningData, fit_margin, tune_all_margins, tune_plan
from obliteratus.tune.gradient_memory import GradientMemory
from obliteratus.tune.parameters import EditParameters
from obliteratus.tune.targets import OPENING_LENGTHS, TrainingPairs

SETTINGS = Tune(steps=30, tokens=6, batch=6, lr=0.05, margins=(1.0,), weight=10.0)
FEW_STEPS = Tune(steps=5, tokens=6, batch=4, prompts=8)
MEMORY = GradientMemory(rows=6, first=0, recompute=False)


def weak(subject: Subject, axis: int) -> Plan:
    """Where the refuser's direction is written, too little of one axis is removed."""
    site = next(s for s in subject.sites if s.part == "attn.out" and s.layer == 2)
    return Plan((Edit(site, torch.eye(subject.width)[axis][None], 0.3),), subject.source.digest)


def yes(subject: Subject, split: slice) -> TrainingPairs:
    """Prompts of the refuser with the answer that does not refuse."""
    word = byte(subject.tokenizer, "Y")
    rows = {g: render_prompts(subject, ps[split]) for g, ps in asked().groups.items()}
    return TrainingPairs(*([(row, [word] * 6) for row in rows[g]] for g in ("control", "target")))


def test_fitting_lowers_what_it_is_to_lower_and_leaves_the_base_alone() -> None:
    """From a start that is too weak the held-out hinge goes, at no KL; a plan elsewhere gains nothing."""
    subject = refuser()
    before = {name: p.clone() for name, p in subject.model.named_parameters()}
    data = TuningData(subject, yes(subject, slice(0, 8)), yes(subject, slice(8, 12)), SETTINGS, MEMORY)
    start, elsewhere = weak(subject, REFUSAL), weak(subject, 9)
    found = fit_margin(data, EditParameters(start, subject.device, "both"), 0.1, 0)
    lost = fit_margin(data, EditParameters(elsewhere, subject.device, "strengths"), 0.1, 0)
    first = float(data.evaluate(start, 0.1).hinge)
    assert first > 1
    assert found.hinge < 0.1 * first
    assert found.kl < 0.01
    assert lost.hinge > 0.9 * first
    assert found.plan.edits[0].strength > 0.6  # type: ignore[union-attr]
    assert all(torch.equal(p, before[name]) for name, p in subject.model.named_parameters())
    assert all(p.grad is None for p in subject.model.parameters())


def test_it_stops_where_nothing_is_gained() -> None:
    """Controls that do not move, and nothing else asked: patience ends it, and the start is what is kept."""
    subject = refuser()
    alone = TrainingPairs(yes(subject, slice(0, 12)).control, [])
    data, plan = TuningData(subject, alone, alone, SETTINGS, MEMORY), weak(subject, REFUSAL)
    found = fit_margin(data, EditParameters(plan, subject.device, "both"), 0.5, 0)
    assert found.steps == SETTINGS.patience < SETTINGS.steps
    assert found.plan.edits[0].strength == pytest.approx(0.3)  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_blocks_below_the_edits_run_once(name: str, make_plan: Any) -> None:
    """Log-probabilities and gradients as from whole passes, also after a plan that reaches lower; block 0 runs once."""
    subject = tiny_subject(name)
    some = prompt_pairs(subject)
    runs: list[int] = []
    handle = subject.module(f"{subject.layers}.0.{'attn' if name == 'gpt2' else 'self_attn'}").register_forward_hook(
        lambda *_: runs.append(1)
    )
    cached = CachedPairs(subject, some)  # hooks that are there already are no edits
    for plan in (
        random_upper_plan(subject, make_plan),
        make_plan(subject),
        random_upper_plan(subject, make_plan, seed=2),
    ):
        for chosen in ([2, 0], [4]):
            parameters, again = (EditParameters(plan, subject.device, "both") for _ in range(2))
            asked = [some[i] for i in chosen]
            runs.clear()
            with applied(subject, parameters.to_live_plan()):
                found = cached.logp(asked)
            ran = len(runs)
            with applied(subject, again.to_live_plan()):
                whole = compute_answer_logits(subject, asked).log_softmax(-1)
            torch.testing.assert_close(found, whole, rtol=1e-3, atol=1e-4)
            weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(0))
            for x in (found, whole):
                (x * weights).mean().backward()
            for one, two in zip(parameters.trainable, again.trainable, strict=True):
                assert one.grad is not None
                torch.testing.assert_close(one.grad, two.grad, rtol=1e-2, atol=1e-6)
    handle.remove()
    assert ran == 0  # known by then; a whole pass runs it


# ------------------------------------------------------------------------------------------------- runs
def group_prompts(n: int = 8) -> PromptSet:
    """Prompts of a random model, ``n`` of each group in each part."""
    texts = [f"Tell me {i} about it?" for i in range(n)]
    parts = ("fit", "search", "report")
    return PromptSet(
        {
            g: tuple(Prompt(f"{mark}{text} {s}", split=s) for s in parts for text in texts)
            for g, mark in (("target", "# "), ("control", ""))
        }
    )


@pytest.fixture
def easy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model's bytes are no text: any answer will do."""
    monkeypatch.setattr(targets, "does_answer", lambda subject, answer, judge: True)


def test_margins_in_one_run(easy: None, make_plan: Any) -> None:
    """A plan for each margin, from gentle to thorough, in order; the last is the method's."""
    subject, splits = tiny_subject("llama"), split_prompts(group_prompts())
    how = FEW_STEPS.model_copy(update={"margins": (0.0, 2.0), "lr": 0.1, "steps": 20, "weight": 10.0})
    plan = random_upper_plan(subject, make_plan)
    points = tune_all_margins(subject, plan, splits, how, 0, Judge())
    assert [p.margin for p in points] == [0.0, 2.0]
    assert points[1].nll <= points[0].nll + 1e-3
    assert all(isinstance(p, TunedPlan) and p.steps >= 5 for p in points)
    last = tune_plan(subject, plan, splits, how)
    same(last, points[1].plan)


def same(a: Plan, b: Plan) -> None:
    for one, two in zip(a.edits, b.edits, strict=True):
        assert isinstance(one, Edit)
        assert isinstance(two, Edit)
        assert one.strength == pytest.approx(two.strength, rel=1e-5)
        torch.testing.assert_close(one.basis, two.basis, rtol=1e-4, atol=1e-5)


CHANGES = {"weigh.0.low": 0.0, "tune.steps": 5, "tune.tokens": 6, "tune.batch": 4, "verify": [{"use": "behavior"}]}


def test_a_run_resumes_behind_the_stage(easy: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TUNE is kept: a second run with its folder fits nothing, and the plan is the same; another folder fits."""
    subject, made, fitted = tiny_subject("llama"), load_recipe("tuned", CHANGES), []
    step = fit.take_step
    monkeypatch.setattr(fit, "take_step", lambda *args: (fitted.append(1), step(*args)))
    plan, found, *_ = run(made, subject, group_prompts(), Store(tmp_path), force=True)
    assert len(fitted) == 5
    assert "TUNE" in found.seconds
    again, _, *_ = run(made, subject, group_prompts(), Store(tmp_path), force=True)
    assert len(fitted) == 5
    same(again, plan)
    untuned, _, *_ = run(made.model_copy(update={"tune": None}), subject, group_prompts(), force=True)
    assert len(fitted) == 5
    first, other = plan.edits[0], untuned.edits[0]
    assert isinstance(first, Edit)
    assert isinstance(other, Edit)
    assert first.strength != other.strength
    run(made, subject, group_prompts(), force=True)
    assert len(fitted) == 10


def test_search_prompts_are_asked_for() -> None:
    """Without them nothing says when to stop."""
    parts = group_prompts()
    fit_only = {
        g: tuple(replace(p, split="fit" if p.split == "search" else p.split) for p in ps)
        for g, ps in parts.groups.items()
    }
    with pytest.raises(UserError, match="search"):
        run(load_recipe("tuned", CHANGES), tiny_subject("llama"), PromptSet(fit_only), force=True)


def test_what_it_costs() -> None:
    """The cap on steps and their prompts are in the formula; without the stage they are not."""
    made = load_recipe("tuned")
    assert made.tune is not None
    steps = made.tune.steps * len(made.tune.margins)
    assert f"{steps} gradient steps × {2 * made.tune.batch} prompts" in describe_cost(made)["stages"]["TUNE"]
    assert f"× {made.tune.tokens} tokens" in describe_cost(made)["stages"]["TUNE"]
    assert (
        f"× {OPENING_LENGTHS[-1]} tokens" in describe_cost(made)["stages"]["TUNE"]
    )  # openings, before what follows them
    assert describe_cost(made)["memory"]["class"] == "gradients"
    assert "TUNE" not in describe_cost(load_recipe("leace"))["stages"]


# ---------------------------------------------------------------------------------------------- settings
def test_margins_rise() -> None:
    with pytest.raises(ValueError, match="margins must rise"):
        Tune(margins=(0.5, 0.2))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"passes": 2}, "passes=1"),
        ({"excise.kl_budget": 0.1}, "leave out search and kl_budget"),
        ({"excise.norm": "columns"}, "set excise.norm to none"),
        ({"excise.heads": 0.5, "excise.anchored": False}, "leave excise.heads out"),
        ({"excise.parts": ["attn.out", "mlp.in"]}, "take mlp.in out"),
        ({"tune.margins": []}, "tune.margins"),
        ({"tune.prompts": 2}, "tune.prompts"),
    ],
)
def test_recipes_that_cannot_be_tuned(change: dict[str, Any], said: str) -> None:
    """One line says what to do; without the stage the same values are fine."""
    with pytest.raises(UserError, match=said):
        load_recipe("tuned", change)
    if not any(path.startswith("tune.") for path in change):
        assert load_recipe("leace", change).tune is None
