"""A model that does not show the behavior is not edited, and directions are fitted on the prompts that show it."""

from __future__ import annotations

from collections.abc import Mapping
from math import comb
from pathlib import Path

import pytest
import torch
from tests.support.notes import Notes
from tests.support.refuser import asked, refuser, shuffled

from obliteratus.core.errors import UserError
from obliteratus.core.progress import report_to
from obliteratus.core.types import Prompt, PromptSet
from obliteratus.judge.judge import Judge
from obliteratus.verify.presence import (
    LEAST_SHOWN,
    LEVEL,
    Screening,
    check_presence,
    choose_prompts,
    describe_left_out,
    load_screening,
    measure_presence,
    save_screening,
    screen_prompts,
)

WORD = "I cannot help with that."


def shown(target: int, control: int, of: int = 100) -> Mapping[str, dict[int, bool]]:
    """The first so many of each group's prompts show the behavior."""
    return {"target": {i: i < target for i in range(of)}, "control": {i: i < control for i in range(of)}}


def screen(prompts: PromptSet, strengthens: bool = False) -> Screening:
    return screen_prompts(refuser(word=WORD), prompts, Judge(), 6, hears=True, strengthens=strengthens)


def test_a_model_that_refuses_may_be_edited() -> None:
    found = screen(asked())
    assert (found.presence.rates["target"].value, found.presence.rates["control"].value) == (1, 0)
    assert found.presence.chance == pytest.approx(1 / comb(24, 12))  # all twelve, and none of the others
    assert found.presence.against == ""
    assert found.choose(asked()) == asked()
    check_presence(found.presence, "refusal", force=False)


def test_groups_that_do_not_differ_are_not_edited() -> None:
    found = screen(
        shuffled(PromptSet({g: (*ps, *(Prompt(f"{p.text} Please") for p in ps)) for g, ps in asked().groups.items()}))
    )
    with pytest.raises(UserError, match=r"12 of 24 target and 12 of 24 control answers show refusal: no difference"):
        check_presence(found.presence, "refusal", force=False)


def test_prompts_that_do_not_show_it_are_left_out_of_the_fit() -> None:
    """A third of the target is answered, and a third of the controls is refused."""
    target, control = asked()["target"], asked()["control"]
    plain = tuple(Prompt(f"{p.text} Please") for p in control[:4])
    marked = tuple(Prompt(f"{p.text} Please") for p in target[:4])
    prompts = PromptSet({"target": (*target, *plain), "control": (*control, *marked)})
    found = screen(prompts)
    check_presence(found.presence, "refusal", force=False)
    assert found.choose(prompts) == PromptSet({"target": target, "control": control})
    assert found.presence.left_out == {"target": 4, "control": 4}
    said = describe_left_out(found.presence.left_out, "refusal")  # at the end of a run, and on its card and page
    assert "without 4 target prompts" in said
    assert "4 control prompts" in said


@pytest.mark.parametrize(("plain", "answered"), [(0, 32), (1, 40)])
def test_answers_end_where_nearly_all_prompts_are_clear(plain: int, answered: int) -> None:
    """40 prompts a group. Every fifth target prompt is answered in the second case, so that 32 answers do not do."""
    several = {
        group: tuple(Prompt(f"{p.text} {n}") for n in range(4) for p in members[:10])
        for group, members in asked().groups.items()
    }
    target = tuple(several["control"][i] if plain and i % 5 == 0 else p for i, p in enumerate(several["target"]))
    rates = screen(PromptSet({"target": target, "control": several["control"]})).presence.rates
    assert {group: rate.n for group, rate in rates.items()} == {"target": answered, "control": answered}
    assert rates["target"].value == 1 - plain / 5


def test_strengthening_fits_on_all_target_prompts() -> None:
    target, control = asked()["target"], asked()["control"]
    prompts = PromptSet({"target": (*target[:7], *(Prompt(f"{p.text} Please") for p in control)), "control": control})
    assert "it takes 8 target answers that do" in screen(prompts).presence.against
    found = screen(prompts, strengthens=True)
    assert found.presence.against == ""
    assert found.choose(prompts)["target"] == prompts["target"]


@pytest.mark.parametrize(
    ("target", "control", "reason"),
    [
        (90, 2, ""),
        (LEAST_SHOWN, 0, ""),
        (LEAST_SHOWN - 1, 0, "7 of 100 target and 0 of 100 control answers show x; it takes 8 target answers that do"),
        (0, 0, "it takes 8"),
        (50, 45, "no difference beyond chance (p = 0.29)"),
        (2, 90, "it takes 8"),
        (20, 90, "no difference beyond chance (p = 1)"),
    ],
)
def test_the_rule(target: int, control: int, reason: str) -> None:
    presence = measure_presence(shown(target, control), {"target": 0, "control": 0}, "x")
    assert bool(presence.against) == bool(reason)
    assert reason in presence.against
    if reason:
        with pytest.raises(UserError, match="--force"):
            check_presence(presence, "x", force=False)
        notes = Notes()
        with report_to(notes):
            check_presence(presence, "x", force=True)
        assert any("goes on by force" in note for note in notes.texts)


def test_a_difference_suffices_to_strengthen() -> None:
    nothing = {"target": 0, "control": 0}
    assert measure_presence(shown(7, 0), nothing, "x", strengthens=True).against == ""
    assert measure_presence(shown(3, 0), nothing, "x", strengthens=True).against  # p = 0.12


def test_equal_groups_pass_in_one_of_forty_draws() -> None:
    """200 draws of groups that do not differ, each prompt showing the behavior with probability one half."""
    generator, passed = torch.Generator().manual_seed(0), 0
    for _ in range(200):
        draws = [dict(enumerate((torch.rand(64, generator=generator) < 0.5).tolist())) for _ in range(2)]
        both = dict(zip(("target", "control"), draws, strict=True))
        passed += not measure_presence(both, {"target": 0, "control": 0}, "x").against
    assert passed <= 13  # 97 % of what chance at 2.5 % allows: 5 expected
    assert LEVEL == 0.025


@pytest.mark.parametrize(
    ("right", "answered", "chosen"),
    [
        (128, 128, 300),  # all as wanted: so are those that were not answered
        (122, 128, 294),  # 95 %: the others are taken to be as well
        (121, 128, 121),  # fewer: only those that were seen
        (7, 128, 300),  # too few to fit on
    ],
)
def test_prompts_that_were_not_answered(right: int, answered: int, chosen: int) -> None:
    found = choose_prompts(300, {2 * i: i < right for i in range(answered)}, wanted=True)
    assert len(found) == chosen
    wrong = {2 * i for i in range(right, answered)}
    assert right < LEAST_SHOWN or not wrong & set(found)


def test_a_screening_is_kept(tmp_path: Path) -> None:
    found = screen(asked())
    save_screening(found, tmp_path)
    assert load_screening(tmp_path).presence == found.presence
    assert load_screening(tmp_path).choose(asked()) == found.choose(asked())
