"""The dial: 0 is the unedited model, 1 the plan, and between them a scaled plan; the model itself never changes."""

from __future__ import annotations

import gc
import weakref
from contextlib import nullcontext

import pytest
import torch
from tests.support.plans import random_plan
from tests.support.tiny import tiny_subject

from obliteratus.core.chat import Turn
from obliteratus.core.errors import UserError
from obliteratus.core.types import Mask, Plan, Subject
from obliteratus.excise.live import compile, hooks
from obliteratus.excise.live.hooks import applied
from obliteratus.inference.answers import AnswerDecoder
from obliteratus.inference.chat_template import tokenize_prompts
from obliteratus.inference.generate import generate
from obliteratus.inference.stream import AnswerLimits, ConversationCache
from obliteratus.serve.dial import Dial, to_prompt

ASKED = (Turn("user", "What is a comet?"),)
LONGER = (Turn("system", "Be short."), *ASKED, Turn("assistant", "A ball of ice."), Turn("user", "And its tail?"))
LIMITS = AnswerLimits(tokens=12)
NORMS = ("none", "columns", "rows", "unit_rows", "whole")


def expected(subject: Subject, plan: Plan, turns: tuple[Turn, ...]) -> str:
    with applied(subject, plan):
        (row,) = generate(subject, tokenize_prompts(subject, [to_prompt(turns)]), LIMITS.tokens)
    return AnswerDecoder.create(subject).decode(row)


@pytest.fixture
def subject() -> Subject:
    return tiny_subject("llama")


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("turns", [ASKED, LONGER])
def test_answers_are_those_of_the_scaled_plan(subject: Subject, norm: str, turns: tuple[Turn, ...]) -> None:
    plan = random_plan(subject, norm=norm)
    dial = Dial(subject, plan)
    found = {s: "".join(dial.stream(turns, s, LIMITS)) for s in (0.0, 1.0, -1.0, 0.5, 2.0, 0.0)}
    assert found[0.0] == expected(subject, Plan(), turns)
    assert found[1.0] == expected(subject, plan, turns)
    for strength in (-1.0, 0.5, 2.0):
        assert found[strength] == expected(subject, plan.scaled(strength), turns)
    assert len(set(found.values())) > 2  # a dial without effect would pass all of the above


def test_strength_zero_is_the_unedited_model_bit_for_bit_though_masks_have_no_strength(subject: Subject) -> None:
    site = next(s for s in subject.sites if s.part == "mlp.out")
    dial = Dial(subject, Plan((Mask(site, torch.arange(40)),), subject.source.digest))
    row = tokenize_prompts(subject, [to_prompt(ASKED)])[0]
    logits = ConversationCache(subject).next_logits(row)
    for strength, same in ((0.0, True), (0.1, False)):
        setting = dial.prepare(strength)
        with hooks.attached(setting.hooks):
            assert torch.equal(setting.cache.next_logits(row), logits) == same


def test_answers_may_be_taken_in_turns_and_the_model_stays_unedited_between_pieces(subject: Subject) -> None:
    plan = random_plan(subject, strength=1.5)
    dial = Dial(subject, plan)
    pairs = list(zip(dial.stream(ASKED, 0.0, LIMITS), dial.stream(ASKED, 1.0, LIMITS), strict=False))
    n = min(len(expected(subject, p, ASKED)) for p in (Plan(), plan)) // 2
    assert "".join(a for a, _ in pairs)[:n] == expected(subject, Plan(), ASKED)[:n]
    assert "".join(b for _, b in pairs)[:n] == expected(subject, plan, ASKED)[:n]
    answer = dial.stream(ASKED, 1.0, LIMITS)
    next(answer)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in subject.model.modules())


def test_a_closed_answer_stops_and_the_next_is_right(subject: Subject) -> None:
    dial = Dial(subject, random_plan(subject))
    answer = dial.stream(ASKED, 1.0, AnswerLimits(tokens=200))
    first = next(answer)
    answer.close()
    assert list(answer) == []
    assert (answer.text, answer.ended) == (first, "")
    assert "".join(dial.stream(ASKED, 1.0, LIMITS)) == expected(subject, dial.plan, ASKED)


def test_an_answer_tells_how_it_ended(subject: Subject) -> None:
    dial = Dial(subject)
    answer = dial.stream(ASKED, limits=AnswerLimits(tokens=5))
    assert "".join(answer) == answer.text
    assert answer.ended == "limit"
    row = tokenize_prompts(subject, [to_prompt(ASKED)])[0]
    subject.model.generation_config.eos_token_id = generate(subject, [row], 3)[0][2]
    answer = Dial(subject).stream(ASKED, limits=AnswerLimits(tokens=5))
    list(answer)
    assert answer.ended == "end"


def test_turning_the_dial_compiles_once_and_forgets_old_settings(subject: Subject) -> None:
    dial = Dial(subject, random_plan(subject))
    kept = dial.prepare(0.5)
    assert dial.prepare(0.5) is kept
    gone = weakref.ref(kept.cache)
    for strength in (0.6, 0.7):
        dial.prepare(strength)
    del kept
    gc.collect()
    assert gone() is None
    assert list(dial.settings) == [0.6, 0.7]


class WeightReadError(Exception):
    """A weight was read."""


@pytest.mark.parametrize(("norm", "reads"), [*((norm, False) for norm in NORMS), ("unit_rows_rank_3", True)])
def test_a_norm_rule_reads_the_weights_once_for_all_strengths(
    subject: Subject, norm: str, reads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the rule whose factors are another decomposition at each strength."""

    def fail(*_: object) -> None:
        raise WeightReadError

    dial = Dial(subject, random_plan(subject, norm=norm))
    dial.prepare(1.0)
    monkeypatch.setattr(compile, "read_weight", fail)
    with pytest.raises(WeightReadError) if reads else nullcontext():
        dial.prepare(0.5)


@pytest.mark.parametrize("strength", [-1.1, 2.1, float("nan"), float("inf")])
def test_strengths_out_of_range_are_refused(subject: Subject, strength: float) -> None:
    with pytest.raises(UserError, match="from -1 to 2"):
        Dial(subject).stream(ASKED, strength)


def test_a_plan_of_another_model_is_refused(subject: Subject) -> None:
    with pytest.raises(UserError, match="another model"):
        Dial(subject, random_plan(tiny_subject("llama", seed=1)))


def test_the_oldest_turns_make_room_and_the_answer_tells(subject: Subject) -> None:
    """The context has 256 tokens, one a byte, of which a quarter is kept for the answer."""
    said = [Turn("user", "x" * 40), Turn("assistant", "y" * 40)] * 3
    turns = [Turn("system", "Be short."), *said, *ASKED]
    answer = Dial(subject).stream(turns, limits=AnswerLimits(tokens=300))
    assert answer.left_out == 4
    shorter = [turns[0], *said[4:], *ASKED]
    assert "".join(answer) == "".join(Dial(subject).stream(shorter, limits=AnswerLimits(tokens=300)))
    assert Dial(subject).stream(shorter, limits=LIMITS).left_out == 0
    with pytest.raises(UserError, match=r"this turn is too long: with the system turn it has 3\d\d tokens, and 192"):
        Dial(subject).stream([Turn("user", "x" * 300)])


def test_reasoning_of_earlier_answers_is_left_out() -> None:
    turns = (*ASKED, Turn("assistant", "<think>ice?</think>\nIce."), *ASKED)
    assert to_prompt(turns).history == (*ASKED, Turn("assistant", "Ice."))
    assert to_prompt(LONGER).history[1].content == "A ball of ice."


@pytest.mark.parametrize("turns", [(), LONGER[:1], LONGER[:3], (*ASKED, *LONGER)])
def test_a_conversation_ends_with_a_question(turns: tuple[Turn, ...]) -> None:
    with pytest.raises(ValueError, match="the last is the user's"):
        to_prompt(turns)


def test_a_seed_gives_the_same_draws(subject: Subject) -> None:
    dial = Dial(subject)
    first, again, other = (
        "".join(dial.stream(ASKED, limits=AnswerLimits(12, temperature=1.0, seed=s))) for s in (1, 1, 2)
    )
    assert first == again != other
