"""Rows of one batch under different plans are what each is alone.

The reference is `applied` with one plan at a time, which test_executors.py holds to baked weights.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.support.executors import opened
from tests.support.one_at_a_time import above, gathered, rows_of
from tests.support.plans import PlanMaker, random_basis
from torch import Tensor

from obliteratus.core.errors import UserError
from obliteratus.core.types import Edit, Mask, Plan, Shift, Subject
from obliteratus.excise.live import hooks_per_row as live_rows
from obliteratus.excise.live.hooks import applied
from obliteratus.excise.live.hooks_per_row import applied_per_row
from obliteratus.inference import batching as forward
from obliteratus.inference.cached_prompts import CachedPrompts
from obliteratus.inference.chat_template import Ids
from obliteratus.inference.generate import generate
from obliteratus.inference.hooks import decoder_blocks
from obliteratus.inference.logits import first_token_log_probs
from obliteratus.inference.token_losses import token_losses

PARTS = ("attn.out", "mlp.out")
OF_ROW = [0, 1, 2, 1, 0, 2]
TOKENS = 5  # of an answer: the first comes from the prompt's pass, the others from the cache
CLOSE = {"rtol": 0, "atol": 1e-5}


# What hooks meet by row: biases, gains behind the writer, conv1d, parallel blocks, tables of positions, flattened rows.
NAMES = ["llama", "llama_biased", "gemma2", "gpt2", "gpt_neox", "opt"]


@pytest.fixture(scope="module", params=NAMES)
def subject(request: pytest.FixtureRequest) -> Subject:
    return opened(request.param)


def strengths(plan: Plan, *values: float) -> list[Plan]:
    """The same plan at several strengths."""
    return [replace(plan, edits=tuple(replace(e, strength=v) for e in plan.edits)) for v in values]


def one_at_a_time(subject: Subject, plans: list[Plan], of_row: list[int], ids: Ids) -> tuple[Tensor, Ids]:
    """First-token log-probabilities and answers of each row, those of one plan after those of another."""
    logp: dict[int, Tensor] = {}
    answers: dict[int, list[int]] = {}
    for number, plan in enumerate(plans):
        own = [i for i, of_plan in enumerate(of_row) if of_plan == number]
        with applied(subject, plan):
            logp |= dict(zip(own, first_token_log_probs(subject, [ids[i] for i in own]), strict=True))
            answers |= dict(zip(own, generate(subject, [ids[i] for i in own], TOKENS), strict=True))
    return torch.stack([logp[i] for i in range(len(ids))]), [answers[i] for i in range(len(ids))]


def check(subject: Subject, plans: list[Plan], of_row: list[int] = OF_ROW) -> None:
    ids = rows_of()
    logp, answers = one_at_a_time(subject, plans, of_row, ids)
    with applied_per_row(subject, plans, of_row):
        torch.testing.assert_close(first_token_log_probs(subject, ids), logp, **CLOSE)
        assert generate(subject, ids, TOKENS) == answers
    # Negative control: each row under another row's plan is something else.
    turned = [(i + 1) % len(plans) for i in of_row]
    with applied_per_row(subject, plans, turned):
        assert not torch.allclose(first_token_log_probs(subject, ids), logp, atol=1e-3)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in subject.model.modules())


# ----------------------------------------------------------------------------------------------- equal
@pytest.mark.parametrize("parts", [PARTS, ("embed", *PARTS), ("attn.in", "mlp.in")])
def test_strengths_by_row(subject: Subject, make_plan: PlanMaker, parts: tuple[str, ...]) -> None:
    check(subject, strengths(make_plan(subject, parts), 0.5, 1.0, 2.0))


@pytest.mark.parametrize("parts", [PARTS, ("embed", *PARTS), ("attn.in", "mlp.in")])
def test_directions_by_row(subject: Subject, make_plan: PlanMaker, parts: tuple[str, ...]) -> None:
    check(subject, [make_plan(subject, parts, strength=1.5, k=seed + 1, seed=seed) for seed in range(3)])


RULES = ["columns", "rows", "unit_rows", "unit_rows_rank_3", "whole"]


@pytest.mark.parametrize(
    ("name", "norm"),
    [(n, r) for i, n in enumerate(NAMES) for j, r in enumerate(RULES) if i == 0 or i % len(RULES) == j],
)
def test_norm_rules_by_row(name: str, norm: str, make_plan: PlanMaker) -> None:
    """One model with all rules, every other model with one of them."""
    subject = opened(name)
    check(subject, strengths(make_plan(subject, PARTS, norm=norm), 0.5, 1.0, 2.0))


def test_anchors_by_row(subject: Subject, make_plan: PlanMaker) -> None:
    check(subject, strengths(make_plan(subject, PARTS, anchored=True), 0.5, 1.0, 2.0))
    check(subject, [make_plan(subject, PARTS, anchored=True, seed=seed) for seed in range(3)])


def test_oblique_edits_by_row(subject: Subject, make_plan: PlanMaker) -> None:
    def oblique(edit: Edit) -> Edit:
        off = random_basis(subject.width, 3, 7)[:1]
        off = off - off @ edit.basis.T @ edit.basis
        return replace(edit, covectors=edit.basis + off)

    plan = make_plan(subject, PARTS)
    check(subject, strengths(replace(plan, edits=tuple(oblique(e) for e in plan.edits)), 0.5, 1.0, 2.0))
    check(subject, [plan, replace(plan, edits=tuple(oblique(e) for e in plan.edits)), Plan((), plan.model)])


@pytest.mark.parametrize("norm", ["none", "columns"])
def test_heads_masks_and_shifts_by_row(subject: Subject, make_plan: PlanMaker, norm: str) -> None:
    plan = make_plan(subject, PARTS, norm=norm)
    heads = [replace(e, site=replace(e.site, span=(0, 8))) for e in plan.edits if e.site.part == "attn.out"]
    downs = [s for s in subject.sites if s.part == "mlp.out"]
    more = [Shift(s, random_basis(subject.width, 1, 3)[0]) for s in downs]
    masks = [Mask(s, torch.arange(20)) for s in downs]
    check(subject, [Plan(tuple(x), plan.model) for x in (heads, more, [*masks, *heads])])


def test_several_changes_of_one_site(subject: Subject, make_plan: PlanMaker) -> None:
    both = make_plan(subject, (*PARTS, "attn.in"), seed=1) + make_plan(subject, (*PARTS, "attn.in"), seed=2)
    check(subject, strengths(both, 0.5, 1.0, 1.5))
    check(subject, [both, make_plan(subject, PARTS, seed=1), Plan((), both.model)])


def test_one_row_unedited_among_edited_ones(subject: Subject, make_plan: PlanMaker) -> None:
    plan = make_plan(subject, PARTS, strength=2.0)
    check(subject, [plan, Plan((), plan.model), above(plan, 1)])


@pytest.mark.parametrize("tokens", [1, 30])
def test_small_batches_and_rows_that_leave(
    subject: Subject, make_plan: PlanMaker, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows move into the places of finished ones, and their plan with them."""
    monkeypatch.setattr(forward, "CPU_TOKENS", tokens)
    ids, plans = rows_of(), strengths(make_plan(subject, PARTS), 0.5, 1.0, 2.0)
    stop = lambda new: len(new) > sum(new) % 5  # noqa: E731 — any rule that ends rows at different steps
    alone = []
    for row, plan in zip(ids, OF_ROW, strict=True):
        with applied(subject, plans[plan]):
            alone += generate(subject, [row], 12, done=stop)
    assert len({len(answer) for answer in alone}) > 1
    with applied_per_row(subject, plans, OF_ROW):
        assert generate(subject, ids, 12, done=stop) == alone


def test_the_stream_by_row(subject: Subject, make_plan: PlanMaker) -> None:
    ids, plans = rows_of(), strengths(make_plan(subject, PARTS), 0.5, 1.0, 2.0)
    with applied_per_row(subject, plans, OF_ROW):
        found = gathered(subject, ids, budget=60)[0]
    for i, row in enumerate(ids):
        with applied(subject, plans[OF_ROW[i]]):
            torch.testing.assert_close(found[i], gathered(subject, [row])[0][0], rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------ with a trunk
def test_trials_together_on_a_trunk(subject: Subject, make_plan: PlanMaker) -> None:
    ids = rows_of()
    plans = strengths(above(make_plan(subject, PARTS), 1), 0.5, 1.0, 2.0)
    again = CachedPrompts(subject, ids, budget=1e9)
    alone = []
    for plan in plans:
        with applied(subject, plan):
            alone.append((first_token_log_probs(subject, ids), generate(subject, ids, TOKENS)))
    with applied_per_row(subject, plans, [i for i in range(3) for _ in ids]):
        together = again.repeat(3)
        torch.testing.assert_close(together.first_token(), torch.cat([logp for logp, _ in alone]), **CLOSE)
        assert together.generate(TOKENS) == [row for _, answers in alone for row in answers]
        some = together.generate(TOKENS, rows=[0, 7, 13])
    assert some is not None
    assert [i for i, row in enumerate(some) if row] == [0, 7, 13]
    assert again.layers.streams
    with applied(subject, plans[0]):
        torch.testing.assert_close(again.first_token(), alone[0][0], **CLOSE)


# ----------------------------------------------------------------------------------------------- errors
def test_plans_that_share_directions_are_one_edit(make_plan: PlanMaker) -> None:
    subject = opened("llama")
    plan, device = make_plan(subject, PARTS), torch.device("cpu")
    sites = [p.by_site() for p in strengths(plan, 0.5, 1.0, 2.0)]
    path = plan.edits[0].site.parameter
    shared = live_rows.share_edits([s[path] for s in sites], device)
    assert shared is not None
    assert shared[0].strengths.tolist() == [0.5, 1.0, 2.0]
    other = make_plan(subject, PARTS, seed=1).by_site()
    assert live_rows.share_edits([sites[0][path], other[path]], device) is None
    ruled = make_plan(subject, PARTS, norm="rows").by_site()
    assert live_rows.share_edits([ruled[path], ruled[path]], device) is None


def test_what_runs_the_model_must_say_which_rows(make_plan: PlanMaker) -> None:
    subject, ids = opened("llama"), rows_of()
    plans = strengths(make_plan(subject, PARTS), 0.5, 1.0)
    with applied_per_row(subject, plans, [0, 1, 0, 1, 0, 1]):
        with pytest.raises(ValueError, match="does not say which rows"):
            subject.model(torch.tensor([ids[0]]))
        with pytest.raises(ValueError, match="to 6 rows, but 2 prompts"):
            first_token_log_probs(subject, ids[:2])
    subject.model(torch.tensor([ids[0]]))


def test_losses_are_each_plans_own(make_plan: PlanMaker) -> None:
    subject, ids = opened("llama"), rows_of()
    plans = strengths(make_plan(subject, PARTS), 0.5, 1.0)
    with applied_per_row(subject, plans, [0] * 6 + [1] * 6):
        found = token_losses(subject, ids * 2, budget=60)
    for i, plan in enumerate(plans):
        with applied(subject, plan):
            alone = token_losses(subject, ids)
        torch.testing.assert_close(torch.cat(found[6 * i : 6 * i + 6]), torch.cat(alone), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(torch.cat(found[:6]), torch.cat(found[6:]), atol=1e-3)


def test_rows_without_a_plan_and_plans_of_another_model(make_plan: PlanMaker) -> None:
    subject = opened("llama")
    plan = make_plan(subject, PARTS)
    with pytest.raises(ValueError, match="beyond the 1"), applied_per_row(subject, [plan], [0, 1]):
        pass
    with pytest.raises(UserError, match="another model"), applied_per_row(subject, [replace(plan, model="x")], [0]):
        pass
    assert not any(b._forward_hooks or b._forward_pre_hooks for b in decoder_blocks(subject))


def test_a_module_that_mixes_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="does not see whole rows"):
        live_rows.plan_of_token(torch.tensor([0, 1, 0]), 7)
