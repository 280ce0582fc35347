"""TUNE as a stage: what its answers come from, what memory allows, margins in one run, and a run that resumes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.refuser import REFUSAL, asked, byte, refuser
from tests.support.tiny import MODELS, tiny_subject

from obliteratus.causal.interventions import Pair, compute_answer_logits
from obliteratus.core.errors import UserError
from obliteratus.core.run_folder import Store
from obliteratus.core.settings import Tune
from obliteratus.core.types import Edit, Plan, Prompt, PromptSet, Subject
from obliteratus.excise.live.hooks import applied
from obliteratus.forecast.formula import describe_cost
from obliteratus.inference.chat_template import render_prompts
from obliteratus.inference.hooks import decoder_blocks
from obliteratus.pipeline.recipe import load_recipe
from obliteratus.pipeline.run import run
from obliteratus.tune import fit
from obliteratus.tune import targets as answers
from obliteratus.tune.fit import CachedPairs, TunedPlan, TuningData, tune_all_margins, tune_plan
from obliteratus.tune.gradient_memory import GradientMemory, estimate_row_bytes, plan_gradient_memory, recompute_blocks
from obliteratus.tune.parameters import EditParameters
from obliteratus.tune.targets import TrainingPairs, ablate_every_writer, find_answering_pairs, unfold_gain

ANSWER = [5, 9, 12, 40, 41, 42]
SETTINGS = Tune(steps=5, tokens=6, batch=4, prompts=8)


def pairs(subject: Subject, n: int = 5) -> list[Pair]:
    ids = render_prompts(subject, [Prompt(f"Tell me{' all' * i} about {x}?") for i, x in enumerate("abcdefg"[:n])])
    return [(row, ANSWER) for row in ids]


def upper(subject: Subject, make_plan: Any, **options: Any) -> Plan:
    """A random plan above block 0."""
    plan: Plan = make_plan(subject, strength=0.5, **options)
    return replace(plan, edits=tuple(e for e in plan.edits if e.site.layer > 0))


# ----------------------------------------------------------------------------------------------- memory
def graded(subject: Subject, plan: Plan, memory: GradientMemory) -> tuple[list[torch.Tensor], int]:
    """Gradients of one batch, and how often the last block's attention ran again."""
    some = pairs(subject)
    data = TuningData(subject, TrainingPairs(some, some), TrainingPairs(some, some), SETTINGS, memory)
    parameters, runs = EditParameters(plan, subject.device, "both"), []
    handle = decoder_blocks(subject)[-1].register_forward_hook(lambda *_: runs.append(1))
    site = next(s for s in subject.sites if s.part == "attn.out" and s.layer == subject.n_layers - 1)
    inner = subject.module(site.path).register_forward_hook(lambda *_: runs.append(0))
    for part in data.iterate_losses(parameters.to_live_plan(), data.train, 0.1):
        part.total(SETTINGS).backward(retain_graph=True)
    handle.remove()
    inner.remove()
    return [x.grad for x in parameters.trainable if x.grad is not None], runs.count(0) - runs.count(1)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("anchored", [False, True])
def test_gradients_do_not_depend_on_memory(name: str, anchored: bool, make_plan: Any) -> None:
    """All rows in one pass, one at a time, or recomputed on the way back; another margin is another gradient."""
    subject = tiny_subject(name)
    plan = upper(subject, make_plan, anchored=anchored)
    whole, again = graded(subject, plan, GradientMemory(8, 1, False))
    assert again == 0
    assert len(whole) == 2 * len(plan.edits)
    one, _ = graded(subject, plan, GradientMemory(1, 1, False))
    twice, again = graded(subject, plan, GradientMemory(8, 1, True))
    assert again > 0
    for a, b, c in zip(whole, one, twice, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(c, a, rtol=1e-3, atol=1e-5)
    other, _ = graded(subject, upper(subject, make_plan, anchored=anchored, seed=1), GradientMemory(8, 1, False))
    assert not torch.allclose(other[1], whole[1], rtol=1e-2, atol=1e-4)


def test_recomputing_leaves_no_trace() -> None:
    subject = tiny_subject("llama")
    with recompute_blocks(subject, GradientMemory(1, 1, True)):
        assert ["forward" in vars(b) for b in decoder_blocks(subject)] == [False, True, True]
    assert not any("forward" in vars(b) for b in decoder_blocks(subject))


def test_room_follows_memory() -> None:
    """Golden: half of what is free over a row's bytes; never more than asked, never none."""
    subject = tiny_subject("llama")
    some = pairs(subject)
    longest = max(len(p) + len(a) for p, a in some)
    each = estimate_row_bytes(subject, longest, len(ANSWER), subject.n_layers - 1)
    vocabulary = MODELS["llama"][1]["vocab_size"]
    assert each == longest * 2 * 4 * (8 * 32 + 4 * 56) + 4 * 4 * len(ANSWER) * vocabulary
    assert plan_gradient_memory(subject, some, 1, 8, free=int(7 * each)) == GradientMemory(3, 1, False)
    assert plan_gradient_memory(subject, some, 1, 8, free=int(700 * each)) == GradientMemory(8, 1, False)
    assert plan_gradient_memory(subject, some, 1, 8, free=int(1.5 * each)) == GradientMemory(1, 1, True)


def test_nothing_below_the_first_edit_keeps_a_graph(make_plan: Any) -> None:
    """What enters the first edited block needs no gradient; what leaves it does."""
    subject = tiny_subject("llama")
    parameters, needs = EditParameters(upper(subject, make_plan), subject.device, "both"), {}
    handles = [
        block.register_forward_hook(lambda m, a, y, i=i: needs.update({i: y.requires_grad}))
        for i, block in enumerate(decoder_blocks(subject))
    ]
    with applied(subject, parameters.to_live_plan()):
        subject.model(torch.tensor([[1, 2, 3]]))
    for handle in handles:
        handle.remove()
    assert needs == {0: False, 1: True, 2: True}


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_blocks_below_the_edits_run_once(name: str, make_plan: Any) -> None:
    """Log-probabilities and gradients as from whole passes, also after a plan that reaches lower; block 0 runs once."""
    subject = tiny_subject(name)
    some = pairs(subject)
    runs: list[int] = []
    handle = subject.module(f"{subject.layers}.0.{'attn' if name == 'gpt2' else 'self_attn'}").register_forward_hook(
        lambda *_: runs.append(1)
    )
    cached = CachedPairs(subject, some)  # hooks that are there already are no edits
    for plan in (upper(subject, make_plan), make_plan(subject), upper(subject, make_plan, seed=2)):
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


# ---------------------------------------------------------------------------------------------- answers
@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("oblique", [False, True])
def test_insisting_ablates_everywhere(name: str, oblique: bool) -> None:
    """Golden: after a plan of one edit, its stream rows are in the stream of no block. A weak plan leaves them."""
    subject = tiny_subject(name)
    site = next(s for s in subject.sites if s.part == "mlp.out" and s.layer == 1)
    row = torch.nn.functional.normalize(torch.randn(1, subject.width, generator=torch.Generator().manual_seed(3)))
    edit = Edit(site, row, 0.2, covectors=row.clone() if oblique else None)
    plan = Plan((edit,), subject.source.digest)
    d = torch.nn.functional.normalize(unfold_gain(subject, edit))[0]
    assert _along(subject, ablate_every_writer(subject, plan), d) < 1e-3 < 0.05 < _along(subject, plan, d)


def _along(subject: Subject, plan: Plan, d: torch.Tensor) -> float:
    found: list[torch.Tensor] = []
    handles = [
        b.register_forward_hook(lambda m, a, y: found.append((y[0] if isinstance(y, tuple) else y) @ d))
        for b in decoder_blocks(subject)
    ]
    with torch.no_grad(), applied(subject, plan):
        subject.model(torch.tensor([[1, 2, 3, 4, 5]]))
    for handle in handles:
        handle.remove()
    return float(torch.stack(found).abs().max())


def axis_plan(subject: Subject, axis: int, strength: float) -> Plan:
    site = next(s for s in subject.sites if s.part == "attn.out" and s.layer == 2)
    return Plan((Edit(site, torch.eye(subject.width)[axis][None], strength),), subject.source.digest)


def test_refused_prompts_are_asked_again_under_a_stronger_edit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan too weak to end a refusal still gets answers; one along an axis that is not the refusal gets none."""
    subject = refuser()
    no = byte(subject.tokenizer, "N")
    monkeypatch.setattr(answers, "does_answer", lambda subject, answer: answer[0] != no)  # one letter is no text to judge
    ids = render_prompts(subject, asked()["target"])
    with applied(subject, axis_plan(subject, REFUSAL, 0.1)):
        assert {a[0] for a in answers.generate(subject, ids, 6)} == {no}
    assert len(find_answering_pairs(subject, ids, axis_plan(subject, REFUSAL, 0.1), 6)) == len(ids)
    with pytest.raises(UserError, match="refuses every target prompt"):
        find_answering_pairs(subject, ids, axis_plan(subject, 9, 0.1), 6)


# ------------------------------------------------------------------------------------------------- runs
def groups(n: int = 8) -> PromptSet:
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
    monkeypatch.setattr(answers, "does_answer", lambda subject, answer: True)


def test_margins_in_one_run(easy: None, make_plan: Any) -> None:
    """A plan for each margin, from gentle to thorough, in order; the last is the method's."""
    subject, parts = tiny_subject("llama"), groups().split()
    how = SETTINGS.model_copy(update={"margins": (0.0, 2.0), "lr": 0.1, "steps": 20, "weight": 10.0})
    plan = upper(subject, make_plan)
    points = tune_all_margins(subject, plan, parts[0], parts[1], how)
    assert [p.margin for p in points] == [0.0, 2.0]
    assert points[1].nll <= points[0].nll + 1e-3
    assert all(isinstance(p, TunedPlan) and p.steps >= 5 for p in points)
    last = tune_plan(subject, plan, parts[0], parts[1], how)
    same(last, points[1].plan)


def same(a: Plan, b: Plan) -> None:
    for one, two in zip(a.edits, b.edits, strict=True):
        assert isinstance(one, Edit)
        assert isinstance(two, Edit)
        assert one.strength == pytest.approx(two.strength, rel=1e-5)
        torch.testing.assert_close(one.basis, two.basis, rtol=1e-4, atol=1e-5)


CHANGES = {"weigh.0.low": 0.0, "tune.steps": 5, "tune.tokens": 6, "tune.batch": 4, "verify": [{"use": "refusal"}]}


def test_a_run_resumes_behind_the_stage(easy: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TUNE is kept: a second run with its folder fits nothing, and the plan is the same; another folder fits."""
    subject, made, fitted = tiny_subject("llama"), load_recipe("tuned", CHANGES), []
    step = fit.take_step
    monkeypatch.setattr(fit, "take_step", lambda *args: (fitted.append(1), step(*args)))
    plan, found, *_ = run(made, subject, groups(), Store(tmp_path))
    assert len(fitted) == 5
    assert "TUNE" in found.seconds
    again, _, *_ = run(made, subject, groups(), Store(tmp_path))
    assert len(fitted) == 5
    same(again, plan)
    untuned, _, *_ = run(made.model_copy(update={"tune": None}), subject, groups())
    assert len(fitted) == 5
    first, other = plan.edits[0], untuned.edits[0]
    assert isinstance(first, Edit)
    assert isinstance(other, Edit)
    assert first.strength != other.strength
    run(made, subject, groups())
    assert len(fitted) == 10


def test_search_prompts_are_asked_for() -> None:
    """Without them nothing says when to stop."""
    parts = groups()
    fit_only = {
        g: tuple(replace(p, split="fit" if p.split == "search" else p.split) for p in ps)
        for g, ps in parts.groups.items()
    }
    with pytest.raises(UserError, match="search"):
        run(load_recipe("tuned", CHANGES), tiny_subject("llama"), PromptSet(fit_only))


def test_what_it_costs() -> None:
    """The cap on steps and their prompts are in the formula; without the stage they are not."""
    made = load_recipe("tuned")
    assert made.tune is not None
    steps = made.tune.steps * len(made.tune.margins)
    assert f"{steps} gradient steps × {2 * made.tune.batch} prompts" in describe_cost(made)["stages"]["TUNE"]
    assert f"× {made.tune.tokens} tokens" in describe_cost(made)["stages"]["TUNE"]
    assert (
        f"× {answers.OPENING_LENGTHS[-1]} tokens" in describe_cost(made)["stages"]["TUNE"]
    )  # openings, before what follows them
    assert describe_cost(made)["memory"]["class"] == "gradients"
    assert "TUNE" not in describe_cost(load_recipe("leace"))["stages"]
