"""Answers that begin without the behavior and turn to it later are turned away from it where they do."""

from __future__ import annotations

from collections.abc import Sequence

from obliteratus.causal.interventions import Pair
from obliteratus.core.progress import note
from obliteratus.core.types import Plan, Subject
from obliteratus.excise.live.hooks import applied
from obliteratus.inference.answers import AnswerDecoder
from obliteratus.inference.generate import generate
from obliteratus.judge.judge import SHOWN, Judge

# Tokens between the place where an edit steps in and the first sign of the behavior, tried in this order: "I'm sorry,
# but I" is 5 tokens long, and the sentence before it may lead there already.
BACK = (4, 8, 16)
# Tokens that the edited model writes there, and tokens of the unedited model that are kept behind them.
OPENING, KEPT = 4, 6
STEP = 2  # tokens between two looks for the first sign


def mend_relapses(subject: Subject, pairs: Sequence[Pair], plan: Plan, watch: int, judge: Judge) -> list[Pair]:
    """Return the pairs, with longer answers where the unedited model goes on to the behavior within ``watch`` tokens.

    There the model under the plan writes four tokens shortly before the first sign of the behavior, and the unedited
    model goes on without it. A pair for which no such place is found stays as it was.
    """
    whole = _continue(subject, pairs, watch)
    decoder = AnswerDecoder.create(subject)
    signs = {i: sign for i, pair in enumerate(whole) if (sign := find_first_sign(decoder, pair[1], judge)) is not None}
    mended: dict[int, Pair] = {}
    for back in BACK:
        left = [i for i in signs if i not in mended and signs[i] > back]
        turned = _turn(subject, [(whole[i][0], whole[i][1][: signs[i] - back]) for i in left], plan, watch)
        for i, (row, answer) in zip(left, turned, strict=True):
            if find_first_sign(decoder, answer, judge) is None:
                mended[i] = (row, answer[: signs[i] - back + OPENING + KEPT])
    if signs:
        note("TUNE", f"{len(signs)} of {len(pairs)} answers turn to {judge.name} later; {len(mended)} are turned away")
    return [mended.get(i, pair) for i, pair in enumerate(pairs)]


def find_first_sign(decoder: AnswerDecoder, answer: list[int], judge: Judge) -> int | None:
    """Return after how many tokens an answer first shows the behavior, or None if it does not."""
    if judge.judge_answer(decoder.decode(answer)) not in SHOWN:
        return None
    for end in range(STEP, len(answer), STEP):
        if judge.judge_answer(decoder.decode(answer[:end])) in SHOWN:
            return end
    return len(answer)


def _turn(subject: Subject, begun: Sequence[Pair], plan: Plan, watch: int) -> list[Pair]:
    """Let the model under the plan write a few tokens, and the unedited one go on up to ``watch`` tokens."""
    with applied(subject, plan):
        rows = generate(subject, [row + answer for row, answer in begun], OPENING, title="TUNE relapses")
    turned = [(row, answer + more) for (row, answer), more in zip(begun, rows, strict=True)]
    return _continue(subject, turned, watch)


def _continue(subject: Subject, pairs: Sequence[Pair], length: int) -> list[Pair]:
    """Let the unedited model go on with each answer, so that none is shorter than ``length`` tokens if it can be."""
    short = [i for i, (_, answer) in enumerate(pairs) if len(answer) < length]
    if not short:
        return list(pairs)
    rows = [pairs[i][0] + pairs[i][1] for i in short]
    longest = length - min(len(pairs[i][1]) for i in short)
    more = dict(zip(short, generate(subject, rows, longest, title="TUNE answers"), strict=True))
    return [(row, (answer + more.get(i, []))[: max(length, len(answer))]) for i, (row, answer) in enumerate(pairs)]
