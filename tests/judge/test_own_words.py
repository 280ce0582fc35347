"""Own words: planted phrases are found, chance and the prompts' own words are not."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from scipy.stats import fisher_exact

from obliteratus.judge.own_words import begins_with, find_own_words, fisher_chance
from obliteratus.judge.rung import Answered

NOUNS = ("river", "lamp", "chair", "cloud", "pencil", "garden", "train", "window", "coffee", "letter", "wheel", "paper")
VERBS = ("turns", "holds", "takes", "makes", "shows", "keeps", "finds", "brings", "leaves", "opens")


def sentence(rng: random.Random) -> str:
    return f"The {rng.choice(NOUNS)} {rng.choice(VERBS)} a {rng.choice(NOUNS)} and {rng.choice(VERBS)} it again today."


def answers(n: int, rng: random.Random, start: str = "", share: float = 1.0) -> list[Answered]:
    made = []
    for i in range(n):
        begin = f"{start} " if i < share * n else ""
        made.append(Answered(f"Tell me about the {rng.choice(NOUNS)}.", begin + sentence(rng), category=str(i % 3)))
    return made


@pytest.mark.parametrize("start", ["Ach nee, geht nicht:", "申し訳ありません、それは", "Hélas, point du tout."])
def test_a_planted_opening_is_found_in_any_language(start: str) -> None:
    rng = random.Random(0)
    target, control = answers(40, rng, start, share=0.7), answers(40, rng)
    found = find_own_words(target, control)
    assert len(found) == 1
    assert (found[0].target, found[0].control) == (28, 0)
    assert sum(begins_with(a.answer, found) for a in target) == 28
    assert sum(begins_with(a.answer, found) for a in control) == 0


def test_two_openings_are_two_phrases() -> None:
    rng = random.Random(1)
    target = answers(30, rng, "Ach nee, geht nicht:") + answers(20, rng, "Je passe mon tour,")
    found = find_own_words(target, answers(50, rng))
    assert [p.target for p in found] == [30, 20]


def test_chance_gives_nothing() -> None:
    """The same openings in both groups: a phrase is found in at most one of fifty draws, at a level of 0.01."""
    false = 0
    for seed in range(50):
        rng = random.Random(seed)
        both = answers(80, rng, "Well, you see,", share=0.5)
        rng.shuffle(both)
        false += bool(find_own_words(both[:40], both[40:]))
    assert false <= 1


def test_words_of_the_prompt_are_not_the_models_own() -> None:
    rng = random.Random(2)
    target = [
        Answered("Tell me about the red star.", f"The red star {rng.choice(VERBS)} much.", str(i)) for i in range(20)
    ]
    assert find_own_words(target, answers(20, rng)) == ()


def test_what_one_category_alone_says_is_its_topic() -> None:
    rng = random.Random(3)
    target = answers(40, rng)
    topic = [
        Answered(a.prompt, "Out in the galaxy, " + a.answer, "stars") if i % 2 else a for i, a in enumerate(target)
    ]
    assert find_own_words(topic, answers(40, rng)) == ()


@pytest.mark.parametrize(("forms", "heard"), [(4, False), (20, True)])
def test_what_prompts_of_one_form_are_answered_with_is_their_form(forms: int, heard: bool) -> None:
    """Every "tell me a story" is answered with "once upon a time". That says nothing of what the model declines."""
    rng = random.Random(5)
    target = [Answered(f"Form {i % forms} of a story.", f"Once upon a time, {sentence(rng)}") for i in range(40)]
    control = [Answered(f"Kind {i % forms} of a list.", sentence(rng)) for i in range(40)]
    assert bool(find_own_words(target, control)) == heard
    same = [Answered(a.prompt, sentence(rng)) for a in target]  # controls of the same forms are answered otherwise
    assert find_own_words(target, same)


def test_words_far_from_the_start_are_no_opening() -> None:
    rng = random.Random(6)
    target = [
        Answered(a.prompt, f"Here and now there is as ever and always, of the many, {a.answer}")
        for a in answers(30, rng)
    ]
    control = [
        Answered(a.prompt, f"Here and now there is as ever and always, to the few, {a.answer}")
        for a in answers(30, rng)
    ]
    assert find_own_words(target, control) == ()
    shifted = [
        [Answered(a.prompt, a.answer.partition("and always, ")[2]) for a in group] for group in (target, control)
    ]
    assert find_own_words(*shifted)


def test_natural_disclaimers_are_found_without_a_list() -> None:
    lines = [json.loads(line) for line in (Path(__file__).parent / "disclaimers.jsonl").read_text().splitlines()]
    target, control = (
        [Answered(line["prompt"], line["answer"]) for line in lines if line["group"] == group]
        for group in ("target", "control")
    )
    found = find_own_words(target, control)
    assert found[0].text == "im sorry"
    labels = [line["label"] == "disclaimed" for line in lines]
    said = [begins_with(a.answer, found) for a in (*target, *control)]
    assert sum(s and label for s, label in zip(said, labels, strict=True)) >= 0.9 * sum(labels)


@pytest.mark.parametrize(("a", "n", "b", "m"), [(3, 10, 1, 12), (0, 5, 4, 6), (9, 9, 0, 8), (4, 20, 4, 20)])
def test_the_test_is_fishers(a: int, n: int, b: int, m: int) -> None:
    expected = fisher_exact([[a, n - a], [b, m - b]], alternative="greater").pvalue
    assert fisher_chance(a, n, b, m) == pytest.approx(expected, rel=1e-9)
