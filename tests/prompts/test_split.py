"""Parts of a prompt set are disjoint, whole, stay put, and share no wording."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from time import process_time

import pytest
from tests.support.notes import Notes
from tests.support.templates import TASKS, TEMPLATES, count_shared_templates, make_prompts, split_by_hash

from obliteratus.core.progress import report_to
from obliteratus.core.separation import SplitBy
from obliteratus.core.types import SPLITS, Prompt, PromptSet, Splits
from obliteratus.prompts import load_prompts, split_prompts
from obliteratus.prompts.clusters import THRESHOLD
from obliteratus.prompts.folding import fold_prompt, fold_words
from obliteratus.prompts.shingles import largest_similarities, number_shingles

NOUNS = ("lakes", "a drum", "silk", "two owls", "maps", "rye", "the tide", "glue", "my hat", "ink")


def plain(n: int = 100, seed: int = 0) -> tuple[Prompt, ...]:
    """Prompts of random words, which share no wording."""
    rng = random.Random(seed)
    return tuple(Prompt(" ".join(f"w{rng.randrange(10**6)}" for _ in range(6))) for _ in range(n))


def two_groups(seed: int = 0, n: int = 100) -> PromptSet:
    return PromptSet({"target": plain(n, 2 * seed), "control": plain(n, 2 * seed + 1)})


def texts(splits: Splits, group: str = "target") -> list[set[str]]:
    return [{p.text for p in part[group]} for part in splits]


def as_parts(splits: Splits, group: str = "target") -> list[tuple[Prompt, ...]]:
    return [part[group] for part in splits]


def nearest(splits: Splits) -> float:
    """Largest similarity of any prompt of report to one of fit or search, over all groups."""
    groups = [[fold_words(p.text) for ps in part.groups.values() for p in ps] for part in splits]
    others = groups[0] + groups[1]
    rows = number_shingles([*groups[2], *others])
    return max(largest_similarities(rows[: len(groups[2])], rows[len(groups[2]) :]))


def shuffled(prompts: PromptSet, seed: int = 1) -> PromptSet:
    rng = random.Random(seed)
    names = list(prompts.groups)[::-1]
    return PromptSet({g: tuple(rng.sample(prompts[g], len(prompts[g]))) for g in names})


# ------------------------------------------------------------------------------------------ the old properties
def test_parts_are_disjoint_and_whole() -> None:
    prompts = two_groups()
    found = texts(split_prompts(prompts, 0))
    assert [len(p) for p in found] == [60, 15, 25]
    assert set.union(*found) == {p.text for p in prompts["target"]}


def test_the_seed_moves_prompts() -> None:
    prompts = two_groups()
    assert texts(split_prompts(prompts, 1)) != texts(split_prompts(prompts, 0))
    assert texts(split_prompts(prompts, 1)) == texts(split_prompts(prompts, 1))


def test_prompts_that_share_nothing_are_split_by_their_hash() -> None:
    prompts = two_groups()
    assert texts(split_prompts(prompts, 3)) == [{p.text for p in part} for part in split_by_hash(prompts["target"], 3)]


def test_adding_prompts_moves_few() -> None:
    prompts = two_groups()
    more = replace(prompts, groups={**prompts.groups, "target": (*prompts["target"], *plain(5, 9))})
    before, after = texts(split_prompts(prompts, 0)), texts(split_prompts(more, 0))
    moved = sum(text not in after[i] for i, part in enumerate(before) for text in part)
    assert moved <= 10  # at most the five new ones' share at each of the two borders


@pytest.mark.parametrize("split", SPLITS)
def test_pinned_prompts_stay(split: str) -> None:
    prompts = two_groups()
    pinned = tuple(replace(p, split=split) for p in plain(7, 5))
    for seed in range(3):
        found = split_prompts(replace(prompts, groups={**prompts.groups, "target": prompts["target"] + pinned}), seed)
        parts = dict(zip(SPLITS, texts(found), strict=True))
        assert {p.text for p in pinned} <= parts[split]
        assert sum(map(len, parts.values())) == 107


def test_the_digest_knows_texts_pins_and_groups() -> None:
    base = PromptSet({"target": plain(3), "control": plain(3, 1)})
    assert base.digest == PromptSet({"target": plain(3), "control": plain(3, 1)}).digest
    others = [
        PromptSet({"target": plain(3, 1), "control": plain(3)}),
        PromptSet({"target": plain(4), "control": plain(3, 1)}),
        PromptSet({"target": tuple(replace(p, split="fit") for p in plain(3)), "control": plain(3, 1)}),
    ]
    assert len({base.digest, *(o.digest for o in others)}) == 4


# ------------------------------------------------------------------------------------------ shared wording
@pytest.mark.parametrize("seed", range(3))
def test_no_template_is_in_two_parts(seed: int) -> None:
    prompts = PromptSet({"target": make_prompts(), "control": plain(100)})
    splits = split_prompts(prompts, seed)
    assert count_shared_templates(as_parts(splits)) == 0
    assert count_shared_templates(split_by_hash(prompts["target"], seed)) == len(
        TEMPLATES
    )  # a split by hash shares all
    assert nearest(splits) < THRESHOLD
    assert [len(part["control"]) for part in splits] == [60, 15, 25]
    assert [len(part["target"]) for part in splits] == pytest.approx([144, 36, 60], abs=20)  # a template has 20


def test_a_template_of_two_groups_is_in_one_part() -> None:
    prompts = PromptSet({"target": make_prompts(n=10), "control": make_prompts(n=10, start=10)})
    splits = split_prompts(prompts, 0)
    assert count_shared_templates([part["target"] + part["control"] for part in splits]) == 0


def test_bypass_prompts_stay_with_the_target_prompts_that_they_were_made_from() -> None:
    target = plain(60)
    bypass = tuple(Prompt(f"{p.text} thanks") for p in target)
    splits = split_prompts(PromptSet({"target": target, "control": plain(60, 1), "bypass": bypass}), 0)
    for part in splits:
        assert {f"{p.text} thanks" for p in part["target"]} == {p.text for p in part["bypass"]}


@pytest.mark.parametrize("split_by", ["wording", "category"])
def test_the_order_of_prompts_and_groups_decides_nothing(split_by: SplitBy) -> None:
    made = make_prompts(n=12)
    labeled = tuple(replace(p, category=f"c{i % 9}") for i, p in enumerate(plain(50)))
    prompts = PromptSet({"target": (*made, *made[:3], replace(made[0], text=made[0].text.upper())), "control": labeled})
    first = split_prompts(prompts, 0, split_by=split_by)
    for seed in range(3):
        again = split_prompts(shuffled(prompts, seed), 0, split_by=split_by)
        assert texts(again) == texts(first)
        assert texts(again, "control") == texts(first, "control")


@pytest.mark.parametrize("name", ["astronomy", "weather-late"])
def test_loose_prompts_of_an_organism_share_nothing(name: str) -> None:
    prompts = load_prompts(f"organism:{name}", f"organism:{name}")
    loose = PromptSet({g: tuple(replace(p, split="") for p in ps) for g, ps in prompts.groups.items()})
    splits = split_prompts(loose, 0)
    assert nearest(splits) < THRESHOLD
    for group in ("target", "control"):
        shares = [len(part[group]) / len(loose[group]) for part in splits]
        assert shares == pytest.approx([0.60, 0.15, 0.25], abs=0.02)
    by_hash = [PromptSet({"all": part}) for part in split_by_hash((*loose["target"], *loose["control"]))]
    assert nearest(Splits(by_hash[0], by_hash[1], by_hash[2], "")) > THRESHOLD


def test_near_duplicates_are_in_one_part_and_counted() -> None:
    target = plain(60)
    again = tuple(replace(p, text=f"  {p.text.upper()}!") for p in target[:30])
    splits = split_prompts(PromptSet({"target": target + again, "control": plain(60, 1)}), 0)
    folded = [{fold_prompt(p) for p in part["target"]} for part in splits]
    assert not folded[0] & folded[1] | folded[0] & folded[2] | folded[1] & folded[2]
    assert splits.separation is not None
    assert splits.separation.near_duplicates == 30
    by_hash = [{fold_prompt(p) for p in part} for part in split_by_hash(target + again)]
    assert by_hash[0] & by_hash[2]


def test_one_text_under_two_system_turns_is_two_prompts_of_one_part() -> None:
    target = plain(40)
    again = tuple(replace(p, system="Be brief.") for p in target)
    splits = split_prompts(PromptSet({"target": target + again, "control": plain(40, 1)}), 0)
    assert sum(len(part["target"]) for part in splits) == 80
    for part in splits:
        brief = {p.text for p in part["target"] if p.system}
        assert brief == {p.text for p in part["target"] if not p.system}


def test_a_set_of_one_template_is_split_and_says_so() -> None:
    prompts = PromptSet({"target": make_prompts(TEMPLATES[:1], 30), "control": plain(60)})
    notes = Notes()
    with report_to(notes):
        splits = split_prompts(prompts, 0)
    assert all(len(part["target"]) >= n for part, n in zip(splits, (9, 4, 4), strict=True))
    assert splits.separation is not None
    assert splits.separation.broken == 30
    assert splits.separation.above == len(splits.report["target"])
    assert splits.separation.raised > THRESHOLD
    assert any("warning: 30 prompts are of so few templates" in text for text in notes.texts)


def test_only_the_template_that_is_too_large_is_broken() -> None:
    large = tuple(Prompt(TEMPLATES[0].format(f"{task} {noun}")) for task in TASKS for noun in NOUNS)
    small = make_prompts(TEMPLATES[1:], 5)
    splits = split_prompts(PromptSet({"target": large + small, "control": plain(60)}), 0)
    assert splits.separation is not None
    assert splits.separation.broken == len(large)
    assert count_shared_templates([tuple(p for p in part["target"] if p.category) for part in splits]) == 0


def test_two_parts_can_be_filled_by_large_templates_that_stay_whole() -> None:
    """Nothing is broken as long as each part gets half of what it should."""
    prompts = PromptSet({"target": make_prompts(TEMPLATES[:3], 20), "control": plain(60)})
    splits = split_prompts(prompts, 0)
    assert sorted(len(part["target"]) for part in splits) == [20, 20, 20]
    assert splits.separation is not None
    assert splits.separation.broken == 0


# ------------------------------------------------------------------------------------------ pinned
def pinned_templates(pins: Sequence[str]) -> tuple[Prompt, ...]:
    """Twenty prompts of each template, the first two of which are pinned to the part named for the template."""
    return tuple(
        replace(p, split=pin if i < 2 else "")
        for template, pin in zip(TEMPLATES, pins, strict=False)
        for i, p in enumerate(make_prompts((template,), 20))
    )


def test_loose_prompts_join_pinned_ones_of_their_wording() -> None:
    pins = ("fit", "report", "search", "fit", "report", "fit")
    splits = split_prompts(PromptSet({"target": pinned_templates(pins), "control": plain(60)}), 0)
    for name, part in zip(SPLITS, splits, strict=True):
        assert {p.category for p in part["target"]} == {f"template {i}" for i, pin in enumerate(pins) if pin == name}


def test_pins_that_leave_a_part_empty_draw_no_more_than_they_can() -> None:
    splits = split_prompts(PromptSet({"target": pinned_templates(["report"] * 6), "control": plain(60)}), 0)
    assert all(len(part["target"]) >= n for part, n in zip(splits, (36, 9, 15), strict=True))


def test_pinned_prompts_of_two_parts_that_share_wording_are_told() -> None:
    target = tuple(replace(p, split=SPLITS[i % 3]) for i, p in enumerate(make_prompts(n=18)))
    notes = Notes()
    with report_to(notes):
        splits = split_prompts(PromptSet({"target": target, "control": plain(60)}), 0)
    assert splits.separation is not None
    assert splits.separation.pinned == len(target)
    assert (
        f"prompts: warning: {len(target)} pinned prompts share wording with prompts pinned to another part"
        in notes.texts
    )
    apart = tuple(replace(p, split=SPLITS[int(p.category.split()[1]) % 3]) for p in make_prompts(n=18))
    found = split_prompts(PromptSet({"target": apart, "control": plain(60)}), 0).separation
    assert found is not None
    assert found.pinned == 0


# ------------------------------------------------------------------------------------------ categories
def test_categories_stay_in_one_part() -> None:
    target = tuple(replace(p, category=f"c{i % 12}") for i, p in enumerate(plain(240)))
    control = tuple(replace(p, category=f"c{i % 12}") for i, p in enumerate(plain(240, 1)))
    prompts = PromptSet({"target": target, "control": control})

    def shared(splits: Splits) -> int:
        found = [{p.category for ps in part.groups.values() for p in ps} for part in splits]
        return len(found[0] & found[1] | found[0] & found[2] | found[1] & found[2])

    splits = split_prompts(prompts, 0, split_by="category")
    assert shared(splits) == 0
    assert [len(part["target"]) for part in splits] == pytest.approx([144, 36, 60], abs=16)
    assert shared(split_prompts(prompts, 0)) == 12


def test_three_categories_fill_three_parts() -> None:
    target = tuple(replace(p, category=f"c{i % 3}") for i, p in enumerate(plain(60)))
    control = tuple(replace(p, category=f"d{i % 4}") for i, p in enumerate(plain(60, 1)))
    splits = split_prompts(PromptSet({"target": target, "control": control}), 0, True, split_by="category")
    assert all(part[group] for part in splits for group in ("target", "control"))


def test_near_duplicates_join_their_categories() -> None:
    target = tuple(replace(p, category=f"c{i % 6}") for i, p in enumerate(plain(60)))
    control = tuple(replace(p, category=f"d{i % 6}") for i, p in enumerate(plain(60, 1)))

    def joined(*more: Prompt) -> bool:
        """Whether c0 and c1 are in one part whatever the seed."""
        prompts = PromptSet({"target": (*target, *more), "control": control})
        parts = [split_prompts(prompts, seed, split_by="category", force=True) for seed in range(8)]
        return all(any({"c0", "c1"} <= {p.category for p in part["target"]} for part in splits) for splits in parts)

    assert joined(replace(target[0], text=target[0].text.upper(), category="c1"))
    assert not joined()


# ------------------------------------------------------------------------------------------ what is told
def test_the_separation_is_that_of_all_pairs() -> None:
    prompts = PromptSet({"target": make_prompts(), "control": plain(100)})
    notes = Notes()
    with report_to(notes):
        splits = split_prompts(prompts, 0)
    found = splits.separation
    assert found is not None
    assert found.largest == pytest.approx(nearest(splits))
    assert (found.clusters, found.clustered, found.broken, found.above) == (12, 240, 0, 0)
    assert notes.texts == [
        "prompts: 12 clusters that share 30% of their wording (240 prompts) stay in one part each, with 0 near "
        f"duplicates; report prompts share a median of {found.median:.0%} and at most {found.largest:.0%} of their "
        "wording with the nearest fit or search prompt"
    ]


def test_twenty_thousand_prompts_a_group() -> None:
    """Pairs are not compared one by one: 800 million of them would take an hour."""
    rng = random.Random(0)
    groups = {
        group: tuple(
            replace(p, text=p.text + " ".join(f" {group[0]}{rng.randrange(3000)}" for _ in range(3)))
            for p in make_prompts(n=20_000 // len(TEMPLATES))
        )
        for group in ("target", "control")
    }
    start = process_time()
    splits = split_prompts(PromptSet(groups), 0)
    assert process_time() - start < 60  # it takes a tenth of that on a quiet machine
    assert count_shared_templates([part["target"] + part["control"] for part in splits]) == 0
    assert sum(len(part["target"]) for part in splits) > 19_900
