"""Fitting: a real gain, an untouched base, cached blocks, a front, the judge as referee, and a run that resumes."""

from __future__ import annotations

import json
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
from obliteratus.excise.plan import load_plan
from obliteratus.forecast.formula import describe_cost
from obliteratus.inference.chat_template import render_prompts
from obliteratus.judge.judge import Judge
from obliteratus.pipeline.recipe import load_recipe
from obliteratus.pipeline.run import run
from obliteratus.prompts import split_prompts
from obliteratus.tune import fit, targets
from obliteratus.tune.fit import MIN_STRENGTH, Fit, tune_plan
from obliteratus.tune.front import Tuned, TunedPlan, find_front, load_tuned, save_tuned
from obliteratus.tune.gradient_memory import GradientMemory
from obliteratus.tune.objective import ZERO_LOSS
from obliteratus.tune.parameters import EditParameters
from obliteratus.tune.search_check import Checked, SearchCheck
from obliteratus.tune.targets import OPENING_LENGTHS, TrainingPairs
from obliteratus.tune.tuning_data import CachedPairs, TuningData

SETTINGS = Tune(steps=30, tokens=6, batch=6, lr=0.1, margin=0.1, weight=10.0)
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
    return TrainingPairs(*([(row, [word]) for row in rows[g]] for g in ("control", "target")))


def refusing() -> Subject:
    """The refuser in words that the judge knows."""
    return refuser(word="I cannot help.")


def fit_from(plan: Plan, settings: Tune = SETTINGS, what: Any = "both", pairs: TrainingPairs | None = None) -> Fit:
    """A fit of the refuser, which is judged by its answers to search prompts."""
    subject = refusing()
    train, held_out = pairs or yes(subject, slice(0, 8)), pairs or yes(subject, slice(8, 12))
    data = TuningData(subject, train, held_out, settings, MEMORY)
    search = PromptSet({group: members[8:12] for group, members in asked().groups.items()})
    check = SearchCheck(subject, search, Judge(), 6)
    return Fit(data, EditParameters(plan, subject.device, what), check, 0.0)


def test_fitting_lowers_what_it_is_to_lower_and_leaves_the_base_alone() -> None:
    """From a start that is too weak refusals go, at no KL; a plan elsewhere gains nothing."""
    start, elsewhere = weak(refusing(), REFUSAL), weak(refusing(), 9)
    fit_weak, fit_elsewhere = (fit_from(plan, what="strengths") for plan in (start, elsewhere))
    subject = fit_weak.data.subject
    before = {name: p.clone() for name, p in subject.model.named_parameters()}
    points, lost = fit_weak.take_steps(), fit_elsewhere.take_steps()
    assert points[0].checked.rate == 1
    found = fit_weak.choose(points)
    assert float(found.loss.hinge) < 0.1 * float(points[0].loss.hinge)
    assert (found.checked.rate, found.checked.kl < 0.01) == (0, True)
    assert fit_elsewhere.choose(lost).checked.rate == 1
    assert found.plan.edits[0].strength > 0.6  # type: ignore[union-attr]
    assert all(torch.equal(p, before[name]) for name, p in subject.model.named_parameters())
    assert all(p.grad is None for p in subject.model.parameters())


def test_it_stops_where_nothing_is_gained() -> None:
    """Controls that do not move, and nothing else asked: patience ends it, and the start is what is kept."""
    alone = TrainingPairs(yes(refusing(), slice(0, 12)).control, [])
    fit_alone = fit_from(weak(refusing(), 9), pairs=alone)
    points = fit_alone.take_steps()
    assert points[-1].steps == SETTINGS.patience < SETTINGS.steps
    assert fit_alone.choose(points) is points[0]


def test_openings_weigh_more_until_the_goal_is_reached() -> None:
    """The judge on search prompts moves the weight, within its limits: not the loss."""
    made = fit_from(weak(refusing(), REFUSAL))
    weights = []
    for rate in (0.5, 0.5, 0.0):
        made.adapt_weight(point(rate, 0.1))
        weights.append(made.weight)
    assert SETTINGS.weight < weights[0] < weights[1]
    assert weights[2] < weights[1]
    for _ in range(50):
        made.adapt_weight(point(1.0, 0.1))
    assert made.weight == fit.WEIGHTS[1]


def point(rate: float, kl: float, degenerate: float = 0.0, scale: float = 1.0) -> TunedPlan:
    loss = replace(ZERO_LOSS, kl=torch.tensor(kl))
    return TunedPlan(Plan(), Checked(rate, degenerate, kl), loss, 10, scale)


def test_the_cheapest_plan_within_the_limits_is_chosen() -> None:
    """Not the one with the least loss: refusals and loops beyond their limits count first."""
    made = fit_from(weak(refusing(), REFUSAL))
    cheap, looping, good, dear = point(0.3, 0.001), point(0.0, 0.002, 0.5), point(0.0, 0.1), point(0.0, 0.2)
    assert made.choose([cheap, looping, dear, good]) is good
    assert made.choose([cheap, looping]) is cheap  # the lesser excess
    made.goal = 0.3
    assert made.choose([cheap, good]) is cheap


def test_sparsity_counts_in_the_choice() -> None:
    """Of two equally good plans the weaker one is chosen, but only if sparsity is asked for."""
    strong, slight = ([weak(refusing(), REFUSAL)], 0.9), ([weak(refusing(), REFUSAL)], 0.3)
    for sparsity, expected in ((0.0, 0), (1.0, 1)):
        made = fit_from(strong[0][0], SETTINGS.model_copy(update={"sparsity": sparsity}))
        points = [
            replace(point(0.0, 0.1), plan=replace(plan, edits=(replace(plan.edits[0], strength=s),)))  # type: ignore[type-var]
            for (plan,), s in (strong, slight)
        ]
        assert made.choose(points) is points[expected]


def test_weaker_plans_are_tried_until_one_refuses() -> None:
    """From a plan that removes all, half as much still does; a plan that does not is tried at higher strengths."""
    whole = weak(refusing(), REFUSAL)
    whole = replace(whole, edits=(replace(whole.edits[0], strength=1.0),))  # type: ignore[type-var]
    made = fit_from(whole)
    points = [made.look(0)]
    scaled = made.scale_best(points)
    assert [p.scale for p in scaled] == list(fit.SCALES[: len(scaled)])
    assert all(p.plan.edits[0].strength == pytest.approx(p.scale) for p in scaled)  # type: ignore[union-attr]
    assert all(p.checked.rate == 0 for p in scaled[:-1])
    elsewhere = fit_from(weak(refusing(), 9))
    assert [p.scale for p in elsewhere.scale_best([elsewhere.look(0)])] == list(fit.STRONGER)


def test_the_front_goes_from_gentle_to_thorough() -> None:
    points = [point(0.5, 0.01), point(0.0, 0.3), point(0.0, 0.2), point(0.4, 0.25), point(1.0, 0.0), point(0.2, 0.05)]
    assert [(p.checked.rate, p.checked.kl) for p in find_front(points)] == [(1, 0), (0.5, 0.01), (0.2, 0.05), (0, 0.2)]


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


def test_a_plan_is_fitted_in_one_run(easy: None, make_plan: Any) -> None:
    """The result is one of the plans on the way, and the same with the same seed."""
    subject, splits = tiny_subject("llama"), split_prompts(group_prompts())
    plan = random_upper_plan(subject, make_plan)
    tuned, again = (tune_plan(subject, plan, splits, FEW_STEPS) for _ in range(2))
    same(tuned.plan, again.plan)
    assert all(abs(e.strength) > 0.3 * MIN_STRENGTH for e in tuned.plan.edits if isinstance(e, Edit))
    assert {"rate", "kl", "degenerate", "hinge", "steps", "scale", "edits"} <= set(tuned.front[0].describe())


def test_the_front_is_kept(tmp_path: Path) -> None:
    points = [replace(point(rate, kl), plan=weak(refusing(), REFUSAL)) for rate, kl in ((0.5, 0.1), (0.0, 0.3))]
    save_tuned(Tuned(points[1].plan, points), tmp_path)
    same(load_tuned(tmp_path).plan, points[1].plan)
    same(load_plan(tmp_path / "front" / "1"), points[0].plan)
    described = json.loads((tmp_path / "front" / "front.json").read_text())
    assert [(one["number"], one["rate"]) for one in described] == [(1, 0.5), (2, 0.0)]


def same(a: Plan, b: Plan) -> None:
    for one, two in zip(a.edits, b.edits, strict=True):
        assert isinstance(one, Edit)
        assert isinstance(two, Edit)
        assert one.strength == pytest.approx(two.strength, rel=1e-5)
        torch.testing.assert_close(one.basis, two.basis, rtol=1e-4, atol=1e-5)


CHANGES = {
    "analyze": [],
    "weigh.0.low": 0.0,
    "tune.steps": 5,
    "tune.tokens": 6,
    "tune.batch": 4,
    "verify": [{"use": "behavior"}],
}


def test_a_run_resumes_behind_the_stage(easy: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TUNE is kept: a second run with its folder fits nothing, and the plan is the same; another folder fits."""
    anchored = {
        "excise.anchored": True,
        "excise.least_change": False,
        "excise.own_difference": False,
    }  # the tiny model gets better from there
    subject, made, fitted = tiny_subject("llama"), load_recipe("tuned", CHANGES | anchored), []
    step = Fit.take_step
    monkeypatch.setattr(Fit, "take_step", lambda *args: (fitted.append(1), step(*args)))
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
    assert f"{made.tune.steps} gradient steps × {2 * made.tune.batch} prompts" in describe_cost(made)["stages"]["TUNE"]
    assert f"× {made.tune.tokens} tokens" in describe_cost(made)["stages"]["TUNE"]
    assert (
        f"× {OPENING_LENGTHS[-1]} tokens" in describe_cost(made)["stages"]["TUNE"]
    )  # openings, before what follows them
    assert describe_cost(made)["memory"]["class"] == "gradients"
    assert "TUNE" not in describe_cost(load_recipe("leace"))["stages"]


# ---------------------------------------------------------------------------------------------- settings
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"passes": 2}, "passes=1"),
        ({"excise.kl_budget": 0.1}, "leave out search and kl_budget"),
        ({"excise.norm": "columns"}, "set excise.norm to none"),
        (
            {"excise.heads": 0.5}
            | dict.fromkeys(("excise.anchored", "excise.own_difference", "excise.least_change"), False),
            "leave excise.heads out",
        ),
        ({"excise.parts": ["attn.out", "mlp.in"]}, "take mlp.in out"),
        ({"tune.margin": -1}, "tune.margin"),
        ({"tune.prompts": 2}, "tune.prompts"),
    ],
)
def test_recipes_that_cannot_be_tuned(change: dict[str, Any], said: str) -> None:
    """One line says what to do; without the stage the same values are fine."""
    with pytest.raises(UserError, match=said):
        load_recipe("tuned", change)
    if not any(path.startswith("tune.") for path in change):
        assert load_recipe("leace", change).tune is None
