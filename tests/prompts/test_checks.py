"""What is wrong with a set of prompts is said in one line with its counts, however the set was made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from tests.support.notes import Notes
from tests.support.tiny import tiny_subject

from obliteratus.analyze.run import run_analysis, select_analyses
from obliteratus.core.errors import UserError
from obliteratus.core.progress import report_to
from obliteratus.core.types import Prompt, PromptSet
from obliteratus.pipeline.recipe import load_recipe
from obliteratus.pipeline.run import run
from obliteratus.prompts import check_enough, check_prompts, load_prompts, read_prompts, split_prompts

WORDS = tuple(
    "oak pine fern moss ivy reed sedge palm yew ash elm fir box may bay fig lime pear plum quince rowan sloe".split()  # noqa: SIM905
)


def write(words: Sequence[str], start: str) -> tuple[Prompt, ...]:
    """Return prompts that share little wording."""
    return tuple(Prompt(f"{word} {start} {word * 2} {word * 3} {word * 4}") for word in words)


def groups(n: int = 14, **more: tuple[Prompt, ...]) -> PromptSet:
    return PromptSet({"target": write(WORDS[:n], "grows"), "control": write(WORDS[:n], "sleeps"), **more})


def test_sets_that_are_in_order_pass() -> None:
    assert check_prompts(groups()) == groups()
    assert split_prompts(groups(), 0).separation is not None


OVERLAPPING = [
    ("target", "control"),
    ("target", "bypass"),
    ("control", "bypass"),
    ("control", "keep"),
    ("bypass", "keep"),
]


@pytest.mark.parametrize(("one", "other"), OVERLAPPING)
def test_all_pairs_of_groups_are_compared_after_folding(one: str, other: str) -> None:
    prompts = groups(bypass=write(WORDS, "sings"), keep=write(WORDS, "waits"))
    stolen = Prompt(f"  {prompts[one][3].text.upper()}?!")
    changed = PromptSet({**prompts.groups, other: (*prompts[other], stolen)})
    message = f"1 prompt is both in {one} and in {other} once case, spaces, punctuation and accents are folded, such as"
    with pytest.raises(UserError, match=message) as caught:
        split_prompts(changed, 0)
    assert f"'{prompts[one][3].text}'" in str(caught.value)
    under = PromptSet({**prompts.groups, other: (*prompts[other], replace(stolen, system="Be brief."))})
    assert check_prompts(under) == under  # another system turn makes another prompt


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (PromptSet({"target": write(WORDS, "a")}), "the group 'control' is missing; give --control SOURCE"),
        (groups(keep=()), "keep: the group 'keep' is empty; give at least one prompt a line"),
        (
            groups(keep=(Prompt("Stay."), Prompt("stay"), Prompt("STAY!"))),
            "keep: all 3 prompts of the group 'keep' are alike once case, spaces, punctuation and accents are folded, "
            "such as 'Stay.'; give different prompts",
        ),
        (groups(keep=write(WORDS[:14], "sleeps")), "control: control and keep hold the same prompts"),
        (
            groups(keep=(Prompt("a b", split="fit"), Prompt("a b", split="report"))),
            "prompts: 'a b' is pinned to fit and to report; pin it to one split",
        ),
    ],
)
def test_sets_from_python_are_checked_like_files(prompts: PromptSet, message: str) -> None:
    with pytest.raises(UserError) as caught:
        split_prompts(prompts, 0)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_runs_and_analyses_check_what_they_are_given() -> None:
    both = groups(keep=write(WORDS[:3], "sleeps"))
    with pytest.raises(UserError, match="3 prompts are both in control and in keep"):
        run(load_recipe("basic"), tiny_subject("llama"), both)
    with pytest.raises(UserError, match="3 prompts are both in control and in keep"):
        run_analysis(tiny_subject("llama"), both, select_analyses(["geometry"]))


# ------------------------------------------------------------------------------------------ duplicates
def test_duplicates_are_left_out_and_counted() -> None:
    prompts = groups()
    doubled = PromptSet({**prompts.groups, "target": prompts["target"] + prompts["target"][:5]})
    notes = Notes()
    with report_to(notes):
        splits = split_prompts(doubled, 0)
    assert sum(len(part["target"]) for part in splits) == 14
    assert splits.separation is not None
    assert splits.separation.duplicates == 5
    assert splits.digest == split_prompts(prompts, 0).digest
    assert notes.texts[0] == "prompts: duplicates left out: target 5 (same text and earlier turns)"


def test_duplicates_of_files_are_counted_once(tmp_path: Path) -> None:
    for name in ("target", "control"):
        lines = [p.text for p in groups()[name]]
        (tmp_path / name).write_text("\n".join([*lines, *lines[:3]]))
    notes = Notes()
    with report_to(notes):
        found = split_prompts(load_prompts(tmp_path / "target", tmp_path / "control"), 0).separation
    assert found is not None
    assert found.duplicates == 6
    assert sum("left out" in text for text in notes.texts) == 1
    assert len(read_prompts(tmp_path / "target")) == 14


def test_of_two_equal_prompts_the_pinned_one_stays() -> None:
    loose = Prompt("a b c")
    for pair in ((loose, replace(loose, split="fit")), (replace(loose, split="fit"), loose)):
        assert check_prompts(groups(keep=(*pair, Prompt("d"))))["keep"][0].split == "fit"


def test_one_text_under_two_system_turns_is_no_duplicate() -> None:
    twice = (Prompt("a b c"), Prompt("a b c", system="Be brief."))
    assert check_prompts(groups(keep=twice))["keep"] == twice


# ------------------------------------------------------------------------------------------ too few
def test_too_few_prompts_are_refused_with_their_counts() -> None:
    with pytest.raises(UserError) as caught:
        split_prompts(groups(13), 0)
    assert str(caught.value) == (
        "prompts: too few to measure anything (target: 8 in fit, 2 in search, 3 in report; control: 8 in fit, 2 in "
        "search, 3 in report); at least 8 in fit, 4 in report are needed: give 14 or more of target and of control "
        "that differ in their wording"
    )
    assert len(split_prompts(groups(14), 0).report["target"]) == 4


def test_a_search_needs_search_prompts() -> None:
    splits = split_prompts(groups(14), 0)
    check_enough(splits)
    with pytest.raises(UserError, match=r"8 in fit, 4 in search, 4 in report are needed: give 24 or more"):
        check_enough(splits, uses_search_split=True)
    with pytest.raises(UserError, match="give 24 or more"):
        split_prompts(groups(14), 0, uses_search_split=True)


def test_force_skips_the_check_and_not_that_of_empty_parts() -> None:
    notes = Notes()
    with report_to(notes):
        assert len(split_prompts(groups(4), 0, force=True).report["target"]) == 1
    assert notes.texts[0].startswith("prompts: warning: too few to measure anything (target: 2 in fit, 1 in search, 1")
    with pytest.raises(
        UserError, match=r"the group 'target' has no prompt in the fit split \(0 in fit, 0 in search, 1"
    ):
        split_prompts(PromptSet({**groups(3).groups, "target": (Prompt("a b", split="report"),)}), 0, force=True)


def test_small_other_groups_are_allowed() -> None:
    assert split_prompts(groups(keep=write(WORDS[:3], "waits")), 0).fit["keep"]


# ------------------------------------------------------------------------------------------ categories
def labeled(names: Sequence[str], **more: tuple[Prompt, ...]) -> PromptSet:
    prompts = groups(20, **more)
    target = tuple(replace(p, category=names[i % len(names)]) for i, p in enumerate(prompts["target"]))
    control = tuple(replace(p, category=f"c{i % 5}") for i, p in enumerate(prompts["control"]))
    return PromptSet({**prompts.groups, "target": target, "control": control})


def test_categories_are_needed() -> None:
    with pytest.raises(UserError) as caught:
        split_prompts(groups(20), 0, split_by="category")
    assert "prompts without a category: 20 of 20 in target, 20 of 20 in control; give all a category" in str(
        caught.value
    )
    with pytest.raises(UserError, match="without a category: 2 of 2 in keep;"):
        split_prompts(labeled("abc", keep=write(WORDS[:2], "waits")), 0, split_by="category")


def test_three_categories_are_needed() -> None:
    with pytest.raises(UserError) as caught:
        split_prompts(labeled(["trees", "herbs"]), 0, split_by="category")
    assert str(caught.value) == (
        "--split-by category: target has 2 of the 3 categories that three parts need (herbs 10, trees 10); give more "
        "categories, or split by wording"
    )
    assert split_prompts(labeled(["trees", "herbs", "vines"]), 0, split_by="category", force=True)
