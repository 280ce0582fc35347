"""Plans fitted by gradients: the same edits, their gradients right, the base untouched, and a gain that is real."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.support.refuser import REFUSAL, asked, byte, refuser
from tests.support.tiny import tiny_subject

from obliteratus.causal.interventions import Pair, compute_answer_logits
from obliteratus.causal.losses import ReferenceLogits
from obliteratus.core.errors import UserError
from obliteratus.core.settings import Tune
from obliteratus.core.types import Edit, Mask, Plan, Prompt, Subject
from obliteratus.excise.bake.tensors import bake
from obliteratus.excise.live.hooks import applied
from obliteratus.inference.chat_template import render_prompts
from obliteratus.inference.generate import generate
from obliteratus.pipeline.recipe import load_recipe
from obliteratus.tune import targets as answers
from obliteratus.tune.fit import TuningData, fit_margin
from obliteratus.tune.gradient_memory import GradientMemory
from obliteratus.tune.objective import LossTerms, control_loss, target_loss
from obliteratus.tune.parameters import EditParameters
from obliteratus.tune.targets import OPENING_LENGTHS, TrainingPairs, continue_openings

KINDS = ["orthogonal", "anchored", "oblique", "rank 2"]


def plan_for(subject: Subject, kind: str, strength: float = 0.7, seed: int = 0) -> Plan:
    """An edit of every writer of the upper half, along random directions."""
    g = torch.Generator().manual_seed(seed)
    edits = []
    for site in subject.sites:
        if site.role == "reads" or site.layer < subject.n_layers // 2 or site.part == "embed":
            continue
        k = 2 if kind == "rank 2" else 1
        basis = torch.linalg.qr(torch.randn(subject.width, k, generator=g))[0].T.contiguous()
        along = None
        if kind == "oblique":
            along = basis + 0.3 * torch.randn(1, subject.width, generator=g)
            along = along / (along @ basis.T)
        anchor = torch.randn(subject.width, generator=g) if kind == "anchored" else None
        edits.append(Edit(site, basis, strength, "none", anchor, along))
    return Plan(tuple(edits), subject.source.digest)


def logits(subject: Subject, plan: Plan) -> torch.Tensor:
    ids = torch.tensor([render_prompts(subject, [Prompt("Tell me about stars?")])[0]])
    with applied(subject, plan), torch.no_grad():
        found: torch.Tensor = subject.model(ids).logits.double()
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_knobs_are_the_plan(kind: str, name: str) -> None:
    """Live with gradients, fixed, and as they came: one map. Another plan is another."""
    subject = tiny_subject(name)
    plan = plan_for(subject, kind)
    parameters = EditParameters(plan, subject.device, "both")
    expected = logits(subject, plan)
    torch.testing.assert_close(logits(subject, parameters.to_live_plan()), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(subject, parameters.to_plan()), expected, rtol=1e-4, atol=1e-5)
    other = logits(subject, plan_for(subject, kind, seed=1))
    assert not torch.allclose(other, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_fitted_is_an_ordinary_plan(kind: str) -> None:
    """After steps along its gradients: orthonormal rows or A Bᵀ = I, the same rank, and it bakes."""
    subject = tiny_subject("llama")
    plan = plan_for(subject, kind)
    parameters = EditParameters(plan, subject.device, "both")
    _moved(subject, parameters, steps=3)
    for before, after in zip(plan.edits, parameters.to_plan().edits, strict=True):
        assert isinstance(before, Edit)
        assert isinstance(after, Edit)
        assert after.basis.shape == before.basis.shape
        assert after.strength != before.strength
        assert not torch.equal(after.basis, before.basis)
        eye = torch.eye(len(after.basis))
        torch.testing.assert_close(after.along @ after.basis.T, eye, rtol=1e-4, atol=1e-4)
        if kind != "oblique":
            assert after.covectors is None
    assert bake(subject, parameters.to_plan())


def _moved(subject: Subject, parameters: EditParameters, steps: int) -> None:
    ids = render_prompts(subject, [Prompt("Tell me about stars?"), Prompt("And about tides?")])
    pairs: list[Pair] = [(row, [5, 9, 12, 40, 41, 42]) for row in ids]
    own, optimizer = ReferenceLogits(subject), torch.optim.Adam(parameters.groups(0.05))
    for _ in range(steps):
        optimizer.zero_grad()
        moved(subject, own, parameters.to_live_plan(), pairs).kl.backward()
        optimizer.step()


def moved(subject: Subject, own: ReferenceLogits, plan: Plan, pairs: list[Pair]) -> LossTerms:
    base = own.logp(pairs)
    with applied(subject, plan):
        return control_loss(compute_answer_logits(subject, pairs).log_softmax(-1), base, pairs)


def willed(subject: Subject, own: ReferenceLogits, plan: Plan, pairs: list[Pair], margin: float) -> LossTerms:
    base = own.logp(pairs)
    with applied(subject, plan):
        return target_loss(compute_answer_logits(subject, pairs).log_softmax(-1), base, pairs, margin)


def test_gradients_are_finite_differences() -> None:
    """Of strength and direction, through live edits with an anchor, in a model of float64."""
    subject = tiny_subject("llama")
    subject.model.double()
    plan = plan_for(subject, "anchored")
    pairs = [(render_prompts(subject, [Prompt("Tell me about stars?")])[0], [5, 9, 12, 40, 41, 42])]
    own = ReferenceLogits(subject)

    def loss(parameters: EditParameters) -> torch.Tensor:
        return moved(subject, own, parameters.to_live_plan(), pairs).kl

    parameters = EditParameters(plan, subject.device, "both")
    loss(parameters).backward()
    strength, basis = parameters.edits[0].strength, parameters.edits[0].basis
    for x, at in ((strength, ()), (basis, (0, 3))):
        assert x.grad is not None
        ends = []
        for step in (-1e-2, 1e-2):
            with torch.no_grad():
                x[at] += step
                ends.append(float(loss(parameters)))
                x[at] -= step
        assert float(x.grad[at]) == pytest.approx((ends[1] - ends[0]) / 2e-2, rel=0.02, abs=1e-6)


@pytest.mark.parametrize(
    ("what", "turns", "pulls"), [("both", True, True), ("strengths", False, True), ("directions", True, False)]
)
def test_what_is_left_alone_stays(what: Any, turns: bool, pulls: bool) -> None:
    subject = tiny_subject("llama")
    plan = plan_for(subject, "oblique")
    parameters = EditParameters(plan, subject.device, what)
    _moved(subject, parameters, steps=2)
    for before, after in zip(plan.edits, parameters.to_plan().edits, strict=True):
        assert isinstance(before, Edit)
        assert isinstance(after, Edit)
        assert (not torch.allclose(after.basis, before.basis, atol=1e-6)) == turns
        assert (abs(after.strength - before.strength) > 1e-6) == pulls


def test_sparsity_drops_sites() -> None:
    """Only the penalty pulls: strengths fall and sites leave the plan. Without it nothing falls."""
    subject = tiny_subject("llama")
    parameters = EditParameters(plan_for(subject, "orthogonal", strength=0.1), subject.device, "strengths")
    optimizer = torch.optim.Adam(parameters.groups(0.03))
    for _ in range(10):
        optimizer.zero_grad()
        parameters.mean_strength().backward()
        optimizer.step()
    assert len(parameters.to_plan(0.05).edits) < len(parameters.plan.edits) == len(parameters.to_plan().edits)


def test_other_changes_stay() -> None:
    subject = tiny_subject("llama")
    plan = plan_for(subject, "orthogonal")
    mask = Mask(next(s for s in subject.sites if s.part == "mlp.out"), torch.tensor([1, 2]))
    parameters = EditParameters(replace(plan, edits=(mask, *plan.edits)), subject.device, "both")
    assert parameters.to_plan(10.0).edits == (mask,)


def test_norm_rules_are_refused() -> None:
    subject = tiny_subject("llama")
    plan = plan_for(subject, "orthogonal")
    edits = tuple(replace(e, norm="columns") for e in plan.edits if isinstance(e, Edit))
    with pytest.raises(UserError, match="norm rule"):
        EditParameters(replace(plan, edits=edits), subject.device, "both")


# ------------------------------------------------------------------------------------------------ pulls
def test_the_hinge_rests_beyond_its_lead() -> None:
    """No gradient where lead by the margin, one where they do not."""
    subject = tiny_subject("llama")
    plan = plan_for(subject, "orthogonal")
    pairs = [(render_prompts(subject, [Prompt("Tell me about stars?")])[0], [5, 9, 12, 40, 41, 42])]
    for margin, rests in ((-100.0, True), (100.0, False)):
        parameters = EditParameters(plan, subject.device, "both")
        pull = willed(subject, ReferenceLogits(subject), parameters.to_live_plan(), pairs, margin)
        pull.hinge.backward()
        gradient = parameters.edits[0].strength.grad
        assert (float(pull.hinge) == 0.0) == rests
        assert (gradient is None or float(gradient) == 0.0) == rests


def test_pulls_by_hand() -> None:
    """Golden: KL and hinge from the model's plain logits in float64."""
    subject = tiny_subject("llama")
    plan = plan_for(subject, "orthogonal")
    prompt, answer = render_prompts(subject, [Prompt("Tell me about stars?")])[0], [5, 9, 12, 40, 41, 42]

    def logp(plan: Plan) -> torch.Tensor:
        with applied(subject, plan), torch.no_grad():
            found = subject.model(torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
        return found[len(prompt) - 1 : -1]

    base, edited = logp(Plan((), subject.source.digest)), logp(plan)
    each = (base.exp() * (base - edited)).sum(-1)
    own, pairs = ReferenceLogits(subject), [(prompt, answer)]
    assert float(moved(subject, own, plan, pairs).kl) == pytest.approx(float(each[0] + each.mean()), rel=1e-3)
    pull = willed(subject, own, plan, pairs, 0.5)
    rivals = base.argmax(-1).tolist()
    decides = [i for i, a in enumerate(answer) if a != rivals[i]]
    assert len(decides) > 3  # random tokens are not what the base would say
    lacks = [max(0.0, 0.5 + float(edited[i, rivals[i]] - edited[i, answer[i]])) for i in decides]
    assert float(pull.hinge) == pytest.approx(sum(lacks), rel=1e-3)
    assert float(pull.nll) == pytest.approx(-sum(float(edited[i, answer[i]]) for i in decides), rel=1e-3)
    same = [i for i in range(6) if i not in decides]
    assert float(pull.drift) == pytest.approx(float(each[same].mean()) if same else 0.0, rel=1e-3)


def test_what_the_base_would_say_has_no_rival() -> None:
    """Its own greedy answer pulls by its drift alone; with another first token, by that token's margin too."""
    subject = tiny_subject("llama")
    plan = plan_for(subject, "orthogonal", strength=2.0)
    prompt = render_prompts(subject, [Prompt("Tell me about stars?")])[0]
    own, greedy = ReferenceLogits(subject), generate(subject, [prompt], 6)[0]
    pull = willed(subject, own, plan, [(prompt, greedy)], 50.0)
    assert float(pull.hinge) == float(pull.nll) == 0.0 < float(pull.drift)
    other = (greedy[0] + 1) % 200
    led_on = [other, *generate(subject, [[*prompt, other]], 5)[0]]
    pull = willed(subject, own, plan, [(prompt, led_on)], 50.0)
    with applied(subject, plan), torch.no_grad():
        first = subject.model(torch.tensor([prompt])).logits[0, -1].double().log_softmax(-1)
    assert float(pull.hinge) == pytest.approx(50 + float(first[greedy[0]] - first[other]), rel=1e-3)


def test_answers_are_gone_on_with_by_the_base_from_the_shortest_opening(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here an answer refuses unless its third token is the plan's: so three are needed, where the plan's differ."""
    subject = tiny_subject("llama")
    plan = plan_for(subject, "orthogonal", strength=3.0)
    ids = render_prompts(subject, [Prompt(f"Tell me about {x}?") for x in "abcdef"])
    with applied(subject, plan):
        openings = dict(zip(map(str, ids), generate(subject, ids, 4), strict=True))
    thirds = {tuple(row[:3]) for row in openings.values()}
    monkeypatch.setattr(answers, "does_answer", lambda subject, answer: tuple(answer[:3]) in thirds)
    found = continue_openings(subject, [(row, openings[str(row)]) for row in ids], 10)
    assert sorted(str(row) for row, _ in found) == sorted(map(str, ids))
    for row, answer in found:
        opening = openings[str(row)]
        tried = [opening[:n] + generate(subject, [row + opening[:n]], 10 - n)[0] for n in OPENING_LENGTHS]
        assert answer == next(a for a in tried if tuple(a[:3]) in thirds)
    assert any(answer[:4] != openings[str(row)] for row, answer in found)  # behind the opening it is not the plan's


# -------------------------------------------------------------------------------------------------- fit
SETTINGS = Tune(steps=60, tokens=6, batch=6, lr=0.03, margins=(1.0,), weight=10.0)
MEMORY = GradientMemory(rows=3, first=0, recompute=False)


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


def test_margins_rise() -> None:
    with pytest.raises(ValueError, match="margins must rise"):
        Tune(margins=(0.5, 0.2))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"passes": 2}, "passes=1"),
        ({"excise.kl_budget": 0.1}, "leave out search and kl_budget"),
        ({"excise.norm": "columns"}, "excise.norm none"),
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
