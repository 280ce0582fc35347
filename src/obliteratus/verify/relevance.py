"""The relevance scorer: whether answers are about what was asked, which an edit can end along with the behavior.

Directions between two groups of prompts hold their topics too. On an organism, strong edits led to fluent answers that
did not refuse and spoke of anything but the topic. Rates, loops and the KL on control prompts see nothing of that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field
from torch import Tensor

from obliteratus.core.errors import UserError
from obliteratus.core.results import Score
from obliteratus.core.shapes import Float
from obliteratus.core.types import Prompt, Subject
from obliteratus.excise.live.hooks import without_edits
from obliteratus.prompts import pick_evenly
from obliteratus.verify.fluency import GROUPS, OPENING, answer_losses, estimate_cost, list_answers
from obliteratus.verify.intervals import mean_score, wilson_rate
from obliteratus.verify.kept import COUNTED, ENDED
from obliteratus.verify.scoring import Measurement, ScorerContext, pick_answers, scorers

# Nats per token by which an answer's own prompt must explain it better than another one does.
ON_TOPIC = 0.1


@scorers.register("relevance", needs=("answers", "base"), cost=lambda options: estimate_cost(options["prompts"]) * 2)
def relevance(
    context: ScorerContext,
    *,
    opening: Annotated[int, Field(ge=0, le=64)] = OPENING,
    prompts: Annotated[int, Field(ge=2)] = 24,
) -> Measurement:
    """Score how much likelier answers are behind their own prompt than behind another one, to the unedited model.

    ``relevance.target`` and ``relevance.control`` are means of log p(answer | its prompt) − log p(answer | a control
    prompt) in nats per token (Li et al. 2016, arXiv:1510.03055): about 0 for an answer that has nothing to do with what
    was asked. ``off_topic.*`` is the share of answers with less than 0.1. Answers that show the behavior or loop do not
    count, so before an edit few target answers do; a group with none that counts has no score.

    opening: how many first tokens of each answer do not count, because the unedited model would have begun otherwise.
    prompts: the most answers of each group, evenly spaced. Raises UserError without answers, with fewer than two
    control prompts, or if the unedited model is not at hand.
    """
    base = context.require_unedited("relevance")
    others = context.prompts.groups.get("control", ())
    if len(others) < 2:
        raise UserError("relevance: answers are compared with other control prompts; give two or more")
    scores = dict[str, Score]()
    for group in (g for g in GROUPS if g in context.prompts.groups):
        answers, rows = list_answers(context, group), pick_evenly(list_counted(context, group), prompts)
        if not rows:
            continue
        asked, said = [context.prompts[group][row] for row in rows], [answers[row] for row in rows]
        unrelated = [others[(row + len(others) // 2) % len(others)] for row in rows]  # half the list from its own place
        with without_edits():
            found = measure_relevance(base, asked, said, unrelated, opening)
        scores[f"relevance.{group}"] = mean_score(found, "nats")
        scores[f"off_topic.{group}"] = wilson_rate(int((found < ON_TOPIC).sum()), len(found))
    # No items are handed on: other prompts may count before an edit than after, so no one could pair them.
    return Measurement(scores)


def list_counted(context: ScorerContext, group: str) -> list[int]:
    """Return the rows of a group whose answers neither show the behavior nor loop."""
    records = pick_answers(context.known.records, group)
    return [row for row, record in enumerate(records) if record["verdict"] in COUNTED[ENDED]]


def measure_relevance(
    subject: Subject, prompts: Sequence[Prompt], answers: Sequence[str], others: Sequence[Prompt], opening: int = 0
) -> Float[Tensor, " n"]:
    """Return by how many nats per token each answer is likelier behind its prompt than behind the other one."""
    losses = answer_losses(subject, [*prompts, *others], [*answers, *answers], opening, "VERIFY relevance")
    own, other = losses.chunk(2)
    return other - own
