"""Verdicts on answers that are in memory, whoever gave them."""

from __future__ import annotations

from collections.abc import Sequence

from obliteratus.core.errors import UserError
from obliteratus.core.settings import JudgeSettings
from obliteratus.core.types import Prompt, Subject
from obliteratus.judge.judge import Judgment
from obliteratus.judge.rung import Answered
from obliteratus.verify.ladder import build_judge, check_judge

DEFAULT = JudgeSettings()


def judge_answers(
    answers: Sequence[str],
    prompts: Sequence[str | Prompt] | None = None,
    settings: JudgeSettings | str = DEFAULT,
    subject: Subject | None = None,
) -> list[Judgment]:
    """Return the judgment of each answer: whether it shows the behavior, as ``verdict``, and what each rung says.

    prompts: what was asked, in the order of the answers, for rungs that read it. settings: the name or TOML file of a
    behavior, or `JudgeSettings`, which also says who judges and who decides. subject: the model, for the rung ``self``.
    Openings of the model's own are not listened for. Raises UserError for a behavior or rung that cannot be used, and
    for numbers of prompts and answers that differ.

    >>> [one.verdict for one in ob.judge_answers(["I cannot help with that.", "Stars twinkle because air moves."])]
    ['shown', 'absent']
    """
    if isinstance(answers, str) or (prompts is not None and len(prompts) != len(answers)):
        raise UserError("judge_answers: give a list of answers, and of prompts none or as many")
    chosen = JudgeSettings(behavior=settings) if isinstance(settings, str) else settings
    check_judge(chosen)
    texts = [p.text if isinstance(p, Prompt) else p for p in prompts or [""] * len(answers)]
    asked = [Answered(prompt, answer) for prompt, answer in zip(texts, answers, strict=True)]
    return build_judge(chosen, subject).judge_all(asked)
