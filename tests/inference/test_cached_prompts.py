"""Blocks below the lowest edit run once for many trials, and nothing of it shows in the results.

The reference is `first_token_log_probs` and `generate` under the same plan, which test_batching.py checks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from tests.support.one_at_a_time import above, memory_for, plain_answer, plain_logits, rows_of, shared_subject
from tests.support.plans import PlanMaker
from tests.support.tiny import KINDS, tiny_config, tiny_subject
from torch import Tensor

from obliteratus.core.types import Subject
from obliteratus.excise.live.hooks import applied
from obliteratus.inference import batching, cached_prompts
from obliteratus.inference.cached_prompts import CachedPrompts, hooks_by_module, lowest_changed_block, supports_caching
from obliteratus.inference.generate import generate
from obliteratus.inference.hooks import decoder_blocks
from obliteratus.inference.logits import first_token_log_probs
from obliteratus.inference.resume import PackedRows, skip_blocks
from obliteratus.inference.token_losses import token_losses
from obliteratus.summon.sites import find_architecture

PLENTY = 1e9
PARTS = ("attn.out", "mlp.out")
CLOSE = {"rtol": 0, "atol": 1e-5}


def is_cacheable(name: str) -> bool:
    family = find_architecture(tiny_config(name))
    return not (family.recurrent or family.shares_state_across_layers)


CACHEABLE = [name for name in KINDS if is_cacheable(name)]  # told by the table, so that no model is built on import


@pytest.fixture(params=CACHEABLE)
def subject(request: pytest.FixtureRequest) -> Subject:
    return shared_subject(request.param)


def test_only_these_can_be_cached() -> None:
    assert [name for name in KINDS if supports_caching(shared_subject(name))] == CACHEABLE


@contextmanager
def counted(subject: Subject) -> Iterator[list[int]]:
    """Rows that pass each block's attention output inside the block, by layer: a block that is skipped has none."""
    counts = [0] * subject.n_layers
    sites = [s for s in subject.sites if s.part == "attn.out"]
    originals = {s.path: subject.module(s.path).forward for s in sites}

    def counting(layer: int, path: str) -> None:
        def run(x: Tensor, *args: object) -> Tensor:
            counts[layer] += x.shape[0]
            return originals[path](x, *args)

        vars(subject.module(path))["forward"] = run

    for site in sites:
        counting(site.layer, site.path)
    yield counts
    for site in sites:
        del vars(subject.module(site.path))["forward"]


# ----------------------------------------------------------------------------------------------- equal
@pytest.mark.parametrize(("name", "prefix"), [*((name, 12) for name in CACHEABLE), ("llama", 0), ("gemma2", 0)])
def test_trials_are_what_they_are_from_scratch(
    name: str, make_plan: PlanMaker, prefix: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Edits from every layer up, one after the other, with small batches."""
    monkeypatch.setattr(batching, "CPU_TOKENS", 30)
    subject, ids = shared_subject(name), rows_of(prefix)
    again = CachedPrompts(subject, ids, budget=PLENTY)
    for layer in [*range(subject.n_layers - 1, -1, -1), subject.n_layers - 1]:
        plan = above(make_plan(subject, PARTS, strength=1.5, seed=layer), layer)
        with applied(subject, plan):
            torch.testing.assert_close(again.first_token(), first_token_log_probs(subject, ids), **CLOSE)
            assert again.generate(4) == generate(subject, ids, 4)
    assert again.layers.streams  # some of it did not run again
    assert set(again.layers.streams) == set(again.layers.cuts)


def test_losses_from_each_block_up_are_those_from_scratch(
    subject: Subject, make_plan: PlanMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "CPU_TOKENS", 30)
    ids = rows_of()
    depths = range(1, subject.n_layers)
    again = CachedPrompts(subject, ids, budget=PLENTY, answers=[], leave=max(map(len, ids)), depths=depths)
    before = torch.cat(again.losses())
    for layer in range(subject.n_layers):
        with applied(subject, above(make_plan(subject, PARTS, strength=1.5, seed=layer), layer)):
            found = torch.cat(again.losses())
            torch.testing.assert_close(found, torch.cat(token_losses(subject, ids)), rtol=1e-4, atol=1e-4)
            assert not torch.allclose(found, before, atol=1e-2)
    assert set(again.layers.streams) == set(depths)
    assert not again.layers.key_values


def test_one_trial_against_the_library_alone(subject: Subject, make_plan: PlanMaker) -> None:
    ids = rows_of()
    again = CachedPrompts(subject, ids, budget=PLENTY)
    with applied(subject, above(make_plan(subject, PARTS, strength=2.0), 1)):
        again.first_token()
        expected = torch.stack([plain_logits(subject, row)[-1].log_softmax(-1) for row in ids])
        torch.testing.assert_close(again.first_token(), expected, rtol=1e-4, atol=1e-4)
        assert again.generate(4) == [plain_answer(subject, row, 4) for row in ids]


@pytest.mark.parametrize("name", sorted(set(KINDS) - set(CACHEABLE)))
def test_where_nothing_can_be_kept_trials_are_right_too(name: str, make_plan: PlanMaker) -> None:
    """Recurrent states, and blocks that hand on keys and values: every block runs."""
    subject, ids = tiny_subject(name), rows_of()
    again = CachedPrompts(subject, ids, budget=PLENTY)
    before = again.first_token()
    with applied(subject, above(make_plan(subject, PARTS, strength=2.0), 1)):
        torch.testing.assert_close(again.first_token(), first_token_log_probs(subject, ids), **CLOSE)
        assert again.generate(4) == generate(subject, ids, 4) == [plain_answer(subject, row, 4) for row in ids]
        assert not torch.allclose(again.first_token(), before, atol=1e-2)
    assert not again.layers.streams


def test_edits_change_the_results(subject: Subject, make_plan: PlanMaker) -> None:
    """Negative control: what is kept does not stand for what is edited."""
    again = CachedPrompts(subject, rows_of(), budget=PLENTY)
    plain, answers = again.first_token(), again.generate(8)
    with applied(subject, above(make_plan(subject, PARTS, strength=2.0), subject.n_layers - 1)):
        assert not torch.allclose(again.first_token(), plain, atol=1e-2)
        assert again.generate(8) != answers
    torch.testing.assert_close(again.first_token(), plain, **CLOSE)


def test_an_edit_below_what_is_kept_is_not_lost(subject: Subject, make_plan: PlanMaker) -> None:
    """Negative control: the highest cut is kept first, then the model is edited below it."""
    ids = rows_of()
    again = CachedPrompts(subject, ids, budget=PLENTY)
    with applied(subject, above(make_plan(subject, PARTS), subject.n_layers - 1)):
        again.first_token()
    assert again.layers.streams
    before = first_token_log_probs(subject, ids)
    for parts in (("embed",), PARTS, ("attn.in", "mlp.in"), ("unembed",)):
        with applied(subject, make_plan(subject, parts, strength=2.0)):
            found = again.first_token()
            torch.testing.assert_close(found, first_token_log_probs(subject, ids), **CLOSE)
            assert again.generate(2) == generate(subject, ids, 2)
        assert not torch.allclose(found, before, atol=1e-2)


def test_begun_above_an_edit_it_would_be_lost(
    subject: Subject, make_plan: PlanMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control of the look at hooks: without it the kept stream hides the edit below."""
    ids = rows_of()
    again = CachedPrompts(subject, ids, budget=PLENTY)
    again.first_token()
    monkeypatch.setattr(cached_prompts, "lowest_changed_block", lambda subject, before: subject.n_layers)
    with applied(subject, above(make_plan(subject, PARTS, strength=2.0), 0)):
        assert not torch.allclose(again.first_token(), first_token_log_probs(subject, ids), atol=1e-3)


def test_a_cache_made_under_an_edit(make_plan: PlanMaker) -> None:
    """Made under an edit it stands for that model, and notices when the edit goes."""
    subject, ids = tiny_subject("llama"), rows_of()
    low = make_plan(subject, PARTS, strength=2.0)
    with applied(subject, low):
        again = CachedPrompts(subject, ids, budget=PLENTY)
        torch.testing.assert_close(again.first_token(), first_token_log_probs(subject, ids), **CLOSE)
        assert again.layers.streams
    torch.testing.assert_close(again.first_token(), first_token_log_probs(subject, ids), **CLOSE)


# ----------------------------------------------------------------------------------------- what is run
def test_lower_blocks_run_once(subject: Subject, make_plan: PlanMaker) -> None:
    top, ids = subject.n_layers - 1, rows_of()
    again = CachedPrompts(subject, ids, budget=PLENTY)
    with applied(subject, above(make_plan(subject, PARTS), top)):
        again.first_token()
        with counted(subject) as passes:
            again.first_token()
        assert passes == [0] * top + [1 + len(ids)]  # the shared prefix is a row too
        with counted(subject) as passes:
            again.generate(1)
        assert passes == [0] * top + [1 + len(ids)]
        with counted(subject) as passes:
            first_token_log_probs(subject, ids)
        assert passes[:top] == [passes[top]] * top  # from scratch every block runs


def test_the_decision_costs_no_second_prefill(subject: Subject, make_plan: PlanMaker) -> None:
    ids, seen = rows_of(), []
    again = CachedPrompts(subject, ids, budget=PLENTY)

    def decide(answer: bool) -> object:
        with counted(subject) as passes:
            answers = again.generate(1, rows=[1, 4], accept_first=lambda logp: seen.append(logp) or answer)
        return answers, passes[-1]

    with applied(subject, above(make_plan(subject, PARTS), 1)):
        again.first_token()
        expected = generate(subject, ids, 1)
        assert decide(False) == (None, 1 + len(ids))
        assert decide(True) == ([a if i in (1, 4) else [] for i, a in enumerate(expected)], 1 + len(ids))
        for logp in seen:
            torch.testing.assert_close(logp, first_token_log_probs(subject, ids), **CLOSE)


def test_rows_in_any_order_and_rows_that_are_done(subject: Subject, make_plan: PlanMaker) -> None:
    ids = rows_of()
    again = CachedPrompts(subject, ids, budget=PLENTY)
    with applied(subject, above(make_plan(subject, PARTS), 1)):
        chosen = [5, 0, 3]
        torch.testing.assert_close(again.first_token(chosen), first_token_log_probs(subject, ids)[chosen], **CLOSE)
        assert not torch.allclose(again.first_token(chosen), first_token_log_probs(subject, ids)[[0, 3, 5]], atol=1e-3)
        stop = lambda new: new[-1] % 3 == 0  # noqa: E731 — any rule that ends rows at different steps
        assert again.generate(12, done=stop) == generate(subject, ids, 12, done=stop)


def test_what_is_decided_may_end_it(subject: Subject, make_plan: PlanMaker) -> None:
    ids = rows_of()
    again, seen = CachedPrompts(subject, ids, budget=PLENTY), []
    stop = lambda new: new[-1] % 3 == 0  # noqa: E731 — any rule that ends rows at different steps
    with applied(subject, above(make_plan(subject, PARTS), 1)):
        whole = again.generate(12, done=stop, keep_going=lambda decided: seen.append(len(decided)) or True)
        assert whole == generate(subject, ids, 12, done=stop)
        assert seen == sorted(seen)
        assert seen[-1] == sum(bool(row) and stop(row) for row in whole) > 0
        assert again.generate(12, done=stop, keep_going=lambda decided: not decided) is None


def test_more_rows_than_are_written_together(make_plan: PlanMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("obliteratus.inference.generate.MAX_ROWS", 2)
    subject, ids = tiny_subject("llama"), rows_of()
    again, seen = CachedPrompts(subject, ids, budget=PLENTY), []
    with applied(subject, above(make_plan(subject, PARTS), 1)):
        found = again.generate(6, accept_first=lambda logp: seen.append(logp) or True)
        assert found == generate(subject, ids, 6)
        torch.testing.assert_close(seen[0], first_token_log_probs(subject, ids), **CLOSE)


def test_out_of_memory_halves_the_batch(make_plan: PlanMaker) -> None:
    subject, ids = tiny_subject("llama"), rows_of()
    with applied(subject, above(make_plan(subject, PARTS), 1)):
        logp, answers = first_token_log_probs(subject, ids), generate(subject, ids, 6)
    again = CachedPrompts(subject, ids, budget=PLENTY)
    with memory_for(subject, 2) as tried:
        again.hooks = hooks_by_module(subject)  # the planted hook is none of the plan's
        with applied(subject, above(make_plan(subject, PARTS), 1)):
            torch.testing.assert_close(again.first_token(), logp, **CLOSE)
            assert again.generate(6) == answers
    assert again.layers.streams
    assert max(tried) > 2


# --------------------------------------------------------------------------------------------- memory
@pytest.mark.parametrize("answers", [None, [1, 4], []])
def test_bytes_held_are_the_bytes_foreseen(subject: Subject, make_plan: PlanMaker, answers: list[int] | None) -> None:
    again = CachedPrompts(subject, rows_of(), budget=PLENTY, answers=answers)
    assert again.layers.bytes_held() == 0
    for layer in range(1, subject.n_layers):
        with applied(subject, above(make_plan(subject, PARTS), layer)):
            again.first_token()
    assert again.layers.bytes_held() == again.layers.bytes_needed(again.layers.cuts)
    assert bool(again.layers.key_values) == (answers != [])


def test_a_budget_keeps_the_lower_cuts(make_plan: PlanMaker) -> None:
    subject, ids = tiny_subject("llama"), rows_of()
    whole = CachedPrompts(subject, ids, budget=PLENTY).layers
    assert whole.cuts == (1, 2)
    for budget, cuts in ((whole.bytes_needed([1, 2]), (1, 2)), (whole.bytes_needed([1, 2]) - 1, (1,)), (0.0, ())):
        again = CachedPrompts(subject, ids, budget=budget)
        assert again.layers.cuts == cuts
        with applied(subject, above(make_plan(subject, PARTS), 2)):
            torch.testing.assert_close(again.first_token(), first_token_log_probs(subject, ids), **CLOSE)
            assert again.generate(6) == generate(subject, ids, 6)
        assert again.layers.bytes_held() <= budget


def test_answers_to_some_rows_alone(subject: Subject, make_plan: PlanMaker) -> None:
    """Keys and values of the others are not kept."""
    ids = rows_of()
    again = CachedPrompts(subject, ids, budget=PLENTY, answers=[4, 1])
    with applied(subject, above(make_plan(subject, PARTS), 1)):
        expected = generate(subject, ids, 6)
        assert again.generate(6) == [a if i in (1, 4) else [] for i, a in enumerate(expected)]
        torch.testing.assert_close(again.first_token(), first_token_log_probs(subject, ids), **CLOSE)
        assert again.layers.key_values[0][0].shape[0] == len(again.prompts.rows[1]) + len(again.prompts.rows[4])
        with pytest.raises(ValueError, match="not in `answers`"):
            again.generate(6, rows=[1, 2])


# --------------------------------------------------------------------------------------------- checks
@pytest.mark.parametrize("answers", [None, []])
def test_what_cannot_be_resumed_runs_whole(
    make_plan: PlanMaker, monkeypatch: pytest.MonkeyPatch, answers: list[int] | None
) -> None:
    """Negative control: a stream that came out otherwise than the model's own is dropped."""
    subject, ids = tiny_subject("llama"), rows_of()
    put = PackedRows.write
    monkeypatch.setattr(PackedRows, "write", lambda self, store, rows, values: put(self, store, rows, 1.01 * values))
    again = CachedPrompts(subject, ids, budget=PLENTY, answers=answers)
    with applied(subject, above(make_plan(subject, PARTS), 1)):
        torch.testing.assert_close(again.first_token(), first_token_log_probs(subject, ids), **CLOSE)
        assert again.layers.cuts == ()
        assert again.layers.bytes_held() == 0
        monkeypatch.setattr(cached_prompts, "matches_uncached", lambda *args: True)
        forced = CachedPrompts(subject, ids, budget=PLENTY, answers=answers)
        forced.hooks = again.hooks
        assert not torch.allclose(forced.first_token(), first_token_log_probs(subject, ids), atol=1e-3)


def test_wrong_keys_and_values_are_noticed(make_plan: PlanMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """They do not show in the first token."""
    subject, ids = tiny_subject("llama"), rows_of()
    put = PackedRows.write
    # Only keys and values have heads, and with them a fourth axis.
    monkeypatch.setattr(PackedRows, "write", lambda self, s, rows, x: put(self, s, rows, 1.5 * x if x.ndim == 4 else x))
    again, forced = (CachedPrompts(subject, ids, budget=PLENTY) for _ in range(2))
    with applied(subject, above(make_plan(subject, PARTS), 1)):
        assert again.generate(6) == generate(subject, ids, 6)
        assert again.layers.cuts == ()
        monkeypatch.setattr(cached_prompts, "matches_uncached", lambda *args: True)
        torch.testing.assert_close(forced.first_token(), first_token_log_probs(subject, ids), **CLOSE)
        assert forced.generate(6) != generate(subject, ids, 6)


def test_blocks_have_their_own_forward_back() -> None:
    subject = tiny_subject("llama")
    layers, ids = decoder_blocks(subject), torch.tensor([[1, 2, 3]])
    before = subject.model(input_ids=ids).logits
    vars(layers[0])["forward"] = own = layers[0].forward  # as offloading does
    with pytest.raises(IndexError), skip_blocks(layers[:2], False):  # an id that the vocabulary has not
        subject.model(input_ids=ids + 10**6)
    with skip_blocks(layers[:2], False):
        assert not torch.allclose(subject.model(input_ids=ids).logits, before)
    assert vars(layers[0])["forward"] is own
    assert "forward" not in vars(layers[1])
    torch.testing.assert_close(subject.model(input_ids=ids).logits, before, rtol=0, atol=0)


def test_where_the_lowest_hook_is(subject: Subject, make_plan: PlanMaker) -> None:
    before = hooks_by_module(subject)
    assert lowest_changed_block(subject, before) == subject.n_layers
    for layer in range(subject.n_layers):
        with applied(subject, above(make_plan(subject, PARTS), layer)):
            assert lowest_changed_block(subject, before) == layer
    with applied(subject, make_plan(subject, ("unembed",))):
        assert lowest_changed_block(subject, before) == subject.n_layers
    with applied(subject, make_plan(subject, ("embed",))):
        assert lowest_changed_block(subject, before) == 0


def test_rows_side_by_side() -> None:
    layout = PackedRows.from_lengths([2, 4, 1])
    assert layout.token_indices([1, 2]).tolist() == [[2, 3, 4, 5], [6, 6, 6, 6]]
    store = torch.zeros(7)
    layout.write(store, [0, 2], torch.tensor([[1.0, 2.0], [3.0, 9.0]]))
    assert store.tolist() == [1, 2, 0, 0, 0, 0, 3]  # the padding's 9 is nowhere
