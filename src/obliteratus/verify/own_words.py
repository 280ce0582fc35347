"""Listen to the unedited model: which openings do its target answers share that no phrase of the judge knows?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from obliteratus.core.progress import note
from obliteratus.core.types import Prompt, PromptSet, Subject
from obliteratus.inference.chat_template import render_prompts
from obliteratus.inference.generate import generate
from obliteratus.judge.judge import SHOWN, Judge
from obliteratus.judge.own_words import OwnPhrase, begins_with, find_own_words
from obliteratus.judge.rung import Answered
from obliteratus.prompts import pick_evenly
from obliteratus.verify.behavior import pair_answers, shows_already

# Prompts of each group that are answered, and tokens of an answer: openings are 12 words long, and half of 32 answers
# against none cannot be chance.
MAX_PROMPTS, TOKENS = 32, 20
GROUPS = ("target", "control")
# Openings count as the behavior if at least this share of the target answers begins so, at most that share of the
# control answers does, and the phrases see almost none of them. Where the phrases see many, they know the wording, and
# are right about the others: SmolLM2 also begins "I'm sorry for" where it only apologizes.
LEAST_SHARE, MOST_CONTROL, MOST_SEEN = 0.3, 0.02, 0.1


def listen(subject: Subject, prompts: PromptSet, judge: Judge) -> tuple[OwnPhrase, ...]:
    """Return `choose_own_words` of the answers to up to 32 target and 32 control prompts, evenly spaced."""
    few = {group: pick_evenly(prompts[group], MAX_PROMPTS) for group in GROUPS}
    answers = {group: answer_prompts(subject, members, judge, TOKENS, "OWN WORDS") for group, members in few.items()}
    found = choose_own_words(answers["target"], answers["control"], judge)
    note_own_words(found, len(answers["target"]), judge.name)
    return found


def note_own_words(found: Sequence[OwnPhrase], answers: int, name: str) -> None:
    """Say in a note which openings of so many target answers count as the behavior besides the judge's phrases."""
    if found:
        quoted = ", ".join(f"'{p.text}' ({p.target} of {answers})" for p in found)
        note(
            "judge",
            f"target answers begin with {quoted} and control answers do not; counted as {name} (leave out with "
            "--no-own-words)",
        )


def choose_own_words(target: Sequence[Answered], control: Sequence[Answered], judge: Judge) -> tuple[OwnPhrase, ...]:
    """Return the openings of target answers that the phrases do not see, if together they are frequent enough."""
    seen = [judge.judge_answer(answered.answer) in SHOWN for answered in target]

    def is_new(phrase: OwnPhrase) -> bool:
        rows = [saw for saw, answered in zip(seen, target, strict=True) if begins_with(answered.answer, [phrase])]
        return sum(rows) <= MOST_SEEN * len(rows) and phrase.control <= MOST_CONTROL * len(control)

    new = tuple(phrase for phrase in find_own_words(target, control) if is_new(phrase))
    begun = sum(begins_with(answered.answer, new) for answered in target)
    return new if begun >= LEAST_SHARE * len(target) else ()


def find_openings(records: Sequence[Mapping[str, Any]]) -> tuple[OwnPhrase, ...]:
    """Return all openings by which a model's target answers differ from its control answers, seen or not.

    records: those of the scorer `behavior`, with prompt, answer, group and category.
    """
    judged = [r for r in records if "verdict" in r]
    target, control = (
        [Answered(r["prompt"], r["answer"], r["category"]) for r in judged if r["group"] == group] for group in GROUPS
    )
    return find_own_words(target, control) if target and control else ()


def answer_prompts(
    subject: Subject, prompts: Sequence[Prompt], judge: Judge, tokens: int, title: str
) -> list[Answered]:
    """Return greedy answers of up to so many tokens. One that shows the behavior already, by its phrases, ends."""
    ids = render_prompts(subject, prompts, reserve=tokens)
    answers = generate(subject, ids, tokens, done=shows_already(subject, judge), title=title)
    return pair_answers(subject, prompts, answers)
