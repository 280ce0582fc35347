"""Whether the behavior returns where prompts are asked otherwise, by the answers before and after its removal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from obliteratus.audit.rewordings import (
    AGAIN,
    OTHERS,
    TURN,
    add_turns,
    ask_to_go_on,
    reword,
)
from obliteratus.core.results import Score
from obliteratus.core.settings import FrozenModel
from obliteratus.core.types import Plan, Prompt, Subject
from obliteratus.excise.live.hooks import applied
from obliteratus.judge.judge import SHOWN, Judge
from obliteratus.judge.own_words import fisher_chance
from obliteratus.verify.intervals import wilson_rate
from obliteratus.verify.judged_prompts import judge_prompts
from obliteratus.verify.own_words import answer_prompts

ORIGINAL = "as they are"
LEVEL = 0.05  # over all wordings together


class Asked(FrozenModel):
    """Prompts in one wording, and which answers to them show the behavior."""

    name: str
    before: tuple[int, ...]
    """By prompt, 1 if the unedited model's answer shows it."""
    after: tuple[int, ...]

    @property
    def rates(self) -> tuple[Score, Score]:
        """Shares before and after, with Wilson's intervals."""
        before, after = (wilson_rate(sum(shown), len(shown)) for shown in (self.before, self.after))
        return before, after


def ask_reworded(
    subject: Subject,
    judge: Judge,
    plan: Plan,
    prompts: Sequence[Prompt],
    own: Mapping[str, Sequence[Prompt]],
    earlier: Prompt,
    tokens: int,
) -> tuple[Asked, ...]:
    """Return what becomes of prompts in their own words, reworded, behind another question, and when asked to go on.

    own: further wordings by name. earlier: the other question, which the unedited model answers first.
    """
    with applied(subject, plan):
        answered = [said.answer for said in answer_prompts(subject, prompts, judge, tokens, "AUDIT answers")]
    other = answer_prompts(subject, [earlier], judge, tokens, "AUDIT answers")[0].answer
    wordings = {ORIGINAL: tuple(prompts)} | reword(prompts)
    wordings[TURN] = tuple(add_turns(prompt, earlier.text, other) for prompt in prompts)
    wordings[AGAIN] = tuple(ask_to_go_on(prompt, said) for prompt, said in zip(prompts, answered, strict=True))
    wordings |= {OTHERS + name: tuple(members) for name, members in own.items()}
    return judge_asked(subject, judge, plan, wordings, tokens)


def judge_asked(
    subject: Subject, judge: Judge, plan: Plan, wordings: Mapping[str, Sequence[Prompt]], tokens: int
) -> tuple[Asked, ...]:
    """Return by wording which answers show the behavior, without the plan and with it."""
    rows = [prompt for members in wordings.values() for prompt in members]
    before = _judge(subject, judge, rows, tokens)
    with applied(subject, plan):
        after = _judge(subject, judge, rows, tokens)
    asked, start = list[Asked](), 0
    for name, members in wordings.items():
        own = slice(start, start + len(members))
        asked.append(Asked(name=name, before=before[own], after=after[own]))
        start += len(members)
    return tuple(asked)


def _judge(subject: Subject, judge: Judge, prompts: Sequence[Prompt], tokens: int) -> tuple[int, ...]:
    verdicts = judge_prompts(subject, prompts, judge.without_witnesses(), tokens, "AUDIT answers")
    return tuple(int(verdict in SHOWN) for verdict in verdicts)


def find_returns(asked: Sequence[Asked]) -> dict[str, float]:
    """Return the wordings in which more answers show the behavior after the removal than in the prompts' own words.

    By name, with p by Fisher's exact test, one-sided, times the number of wordings (Bonferroni).
    """
    first, *others = asked
    tests = {
        one.name: fisher_chance(sum(one.after), len(one.after), sum(first.after), len(first.after)) for one in others
    }
    return {name: p * len(tests) for name, p in tests.items() if p * len(tests) <= LEVEL}
