"""What is compared: runs with kept answers, and models that answer the same prompts now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from obliteratus.core.errors import UserError
from obliteratus.core.progress import note
from obliteratus.core.settings import JudgeSettings, Step
from obliteratus.core.types import Prompt, PromptSet, Subject
from obliteratus.judge.judge import Judge
from obliteratus.rebirth.run_page import read_run
from obliteratus.verify import measure
from obliteratus.verify.answers import FILE, pair_answers, read_lines

Key = tuple[str, str]
"""Group and text of a prompt."""
Line = Mapping[str, Any]
"""Answer, verdict and rungs of one prompt."""
STEPS = (Step(use="behavior"),)
MIN_COMMON = 8  # prompts that runs must share; with fewer nothing could be told apart


@dataclass(frozen=True)
class SideAnswers:
    """One side of a comparison."""

    name: str
    answers: Mapping[Key, Line]
    categories: Mapping[Key, str]
    behavior: str


def is_run(source: str) -> bool:
    """Return whether the source is a folder with kept answers."""
    return (Path(source) / FILE).is_file()


def read_side(source: str, name: str, state: str = "after") -> SideAnswers:
    """Return the answers that a run kept. Raises UserError if it has none in that state, ``before`` or ``after``."""
    lines = [line for line in read_lines(Path(source) / FILE) if line.get(state)]
    if not lines:
        raise UserError(f"{source}: {FILE} holds no answers {state} an edit; give the output folder of a run")
    keys = [(line["group"], line["prompt"]) for line in lines]
    answers = {key: line[state] for key, line in zip(keys, lines, strict=True)}
    categories = {key: line["category"] for key, line in zip(keys, lines, strict=True)}
    return SideAnswers(name, answers, categories, find_behavior(source))


def find_behavior(source: str) -> str:
    """Return the behavior that a folder's answers were judged for."""
    return str(read_run(Path(source)).judge.get("behavior", "refusal")) if _has_record(source) else "refusal"


def find_judge(source: str) -> JudgeSettings:
    """Return the settings of the judge of a run, or the default ones for a folder without a record."""
    return read_run(Path(source)).recipe.judge if _has_record(source) else JudgeSettings()


def _has_record(source: str) -> bool:
    return (Path(source) / "run.json").is_file()


def unedited_side(sources: Sequence[str]) -> SideAnswers | None:
    """Return the answers before the edit as a side of their own, if all runs have the same ones."""
    found = [read_lines(Path(source) / FILE) for source in sources if _has_record(source)]
    before = [
        {(line["group"], line["prompt"]): line["before"] for line in lines if line.get("before")} for lines in found
    ]
    same = before and all(before) and all(set(b) == set(before[0]) for b in before)
    if not same or any(b[key]["answer"] != before[0][key]["answer"] for b in before for key in b):
        return None
    return read_side(next(s for s in sources if _has_record(s)), "unedited", "before")


def measure_side(subject: Subject, name: str, prompts: PromptSet, judge: Judge) -> SideAnswers:
    """Return the answers of a model to the prompts, with the judge's verdicts."""
    lines = list(pair_answers({"after": measure(subject, prompts, STEPS, judge=judge).records}))
    keys = [(line["group"], line["prompt"]) for line in lines]
    return SideAnswers(
        name,
        {key: line["after"] for key, line in zip(keys, lines, strict=True)},
        {key: line["category"] for key, line in zip(keys, lines, strict=True)},
        judge.name,
    )


def to_prompts(side: SideAnswers) -> PromptSet:
    """Return the prompts of a side, so that others can answer them too. Kept answers know no turns before a prompt."""
    groups: dict[str, list[Prompt]] = {}
    for group, text in side.answers:
        groups.setdefault(group, []).append(Prompt(text, category=side.categories[(group, text)]))
    return PromptSet({group: tuple(prompts) for group, prompts in groups.items()})


def keep_common(sides: Sequence[SideAnswers]) -> list[SideAnswers]:
    """Return the sides with the prompts that all of them answered, in the first one's order.

    A note says how many are left out. Raises UserError for sides that were judged for different behaviors, or with
    fewer than eight prompts in common.
    """
    behaviors = sorted({side.behavior for side in sides})
    if len(behaviors) > 1:
        raise UserError(f"compare: the sides were judged for different behaviors ({', '.join(behaviors)})")
    common = [key for key in sides[0].answers if all(key in side.answers for side in sides)]
    if len(common) < MIN_COMMON:
        raise UserError(
            f"compare: {len(common)} prompts were answered on all sides, and it takes {MIN_COMMON}; give runs with the "
            "same prompts, or models and --target and --control"
        )
    if any(len(side.answers) > len(common) for side in sides):
        most = max(len(side.answers) for side in sides)
        note("compare", f"{len(common)} of {most} prompts were answered on all sides; the others are left out")
    return [
        SideAnswers(
            s.name, {key: s.answers[key] for key in common}, {key: s.categories[key] for key in common}, s.behavior
        )
        for s in sides
    ]
