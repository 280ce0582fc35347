"""What search prompts say of keep prompts: only those that showed the behavior count, and losing them is an excess."""

from __future__ import annotations

import pytest
from tests.support.refuser import REFUSAL, asked
from tests.tune.test_balance import refusing, weak

from obliteratus.core.types import Plan, Prompt, PromptSet
from obliteratus.judge.judge import Judge
from obliteratus.tune.front import TunedPlan, find_front
from obliteratus.tune.search_check import LEAST_KEPT, Checked, SearchCheck


def ends_refusals() -> Plan:
    """Twice a weak removal of what it refuses by."""
    return weak(refusing(), REFUSAL).scaled(2 / weak(refusing(), REFUSAL).edits[0].strength)  # type: ignore[union-attr]


def check_with(keep: tuple[Prompt, ...]) -> SearchCheck:
    return SearchCheck(refusing(), PromptSet({**asked().groups, "keep": keep}), Judge(), 6)


def test_only_what_showed_the_behavior_can_be_lost() -> None:
    """Of the keep prompts half are answered from the start: they are neither kept nor lost."""
    prompts = asked()
    check = check_with((*prompts["target"][:6], *prompts["control"][:6]))
    assert check.unedited.kept == 1
    ends = ends_refusals()
    found = check.check(ends)
    assert (found.rate, found.kept) == (0, 0)
    assert check.excess(check.unedited, 1.0) == 0
    assert check.excess(found, 0.0) == pytest.approx(LEAST_KEPT)


def test_a_plan_is_described_by_the_kl_that_was_checked() -> None:
    point = TunedPlan(Plan(), Checked(0.5, 0.0, 0.25, 1.0))
    assert point.loss.kl == 0
    assert point.describe()["kl"] == 0.25
    assert "kept" not in TunedPlan(Plan(), Checked(0.5, 0.0, 0.25)).describe()


def test_a_plan_that_keeps_more_is_on_the_front() -> None:
    gentle, keeping, worse = (Checked(0.1, 0.0, kl, kept) for kl, kept in ((0.1, 0.8), (0.2, 1.0), (0.3, 0.9)))
    points = [TunedPlan(Plan(), checked) for checked in (worse, keeping, gentle)]
    assert [point.checked for point in find_front(points)] == [gentle, keeping]


def test_without_such_prompts_nothing_is_kept_or_lost() -> None:
    ends = ends_refusals()
    for check in (check_with(asked()["control"]), SearchCheck(refusing(), asked(), Judge(), 6)):
        assert check.check(Plan()).kept is None
        assert check.excess(check.check(ends), 0.0) == 0
