"""The answers that a plan is tuned on: the model's own to control prompts, without the behavior to target ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from obliteratus.causal.interventions import Pair
from obliteratus.core.errors import NothingToFitError
from obliteratus.core.progress import note
from obliteratus.core.settings import Tune
from obliteratus.core.shapes import Float
from obliteratus.core.types import Edit, Plan, PromptSet, Site, Subject
from obliteratus.excise.linear import fold_gain_orthogonal
from obliteratus.excise.live.hooks import applied
from obliteratus.excise.writers import remove_from_writers
from obliteratus.inference.answers import AnswerDecoder
from obliteratus.inference.chat_template import Ids, render_prompts
from obliteratus.inference.generate import generate
from obliteratus.judge.judge import Judge
from obliteratus.prompts import pick_evenly
from obliteratus.summon.sites import read_gain
from obliteratus.tune.relapses import mend_relapses

# Numbers of answer tokens to take from the edited model, tried in this order. Longer openings help if the base model
# relapses into the behavior, but then the plan is tuned towards its own wording, which the base model finds unlikely
# (docs/experiments/tuned.md).
OPENING_LENGTHS = (1, 2, 4)


@dataclass(frozen=True)
class TrainingPairs:
    """Prompts with answers: the base model's own to control prompts, and others without the behavior to target ones."""

    control: Sequence[Pair]
    target: Sequence[Pair]


def collect_pairs(
    subject: Subject, prompts: PromptSet, plan: Plan, settings: Tune, max_prompts: int, judge: Judge
) -> TrainingPairs:
    """Generate answers of ``tokens`` tokens: the model's own to control and keep prompts, behavior-free to target.

    Answers in which the behavior comes back within ``watch`` tokens are longer (see `mend_relapses`). At most
    ``max_prompts`` prompts of each group are used, evenly spaced. Raises NothingToFitError if every answer to a target
    prompt shows the behavior.
    """
    tokens, watch = settings.tokens, max(settings.watch, settings.tokens)
    names = [g for g in ("target", "control", "keep") if g in prompts.groups]
    ids = {g: render_prompts(subject, pick_evenly(prompts[g], max_prompts), reserve=watch) for g in names}
    controls = ids["control"] + ids.get("keep", [])
    answers = generate(subject, controls, tokens, title="TUNE own answers")
    control = [pair for pair in zip(controls, answers, strict=True) if pair[1]]
    target = find_answering_pairs(subject, ids["target"], plan, tokens, judge)
    target = mend_relapses(subject, target, plan, watch, judge)
    note("TUNE", f"{len(target)} of {len(ids['target'])} target prompts have an answer without {judge.name} to fit to")
    return TrainingPairs(control, target)


def find_answering_pairs(subject: Subject, ids: Ids, plan: Plan, tokens: int, judge: Judge) -> list[Pair]:
    """Return prompts with answers without the behavior: opened by the edited model and continued by the unedited one.

    The opening is as short as possible, so that everything after it is the base model's own choice and as coherent as
    the base model. Prompts whose answers still show it are tried again under `ablate_every_writer`. Raises
    NothingToFitError if no prompt gets an answer.
    """
    answered: list[Pair] = []
    for attempt in (plan, ablate_every_writer(subject, plan)):
        done = {str(row) for row, _ in answered}
        if remaining := [row for row in ids if str(row) not in done]:
            with applied(subject, attempt):
                openings = generate(subject, remaining, OPENING_LENGTHS[-1], title="TUNE openings")
            answered += continue_openings(subject, list(zip(remaining, openings, strict=True)), tokens, judge)
    if not answered:
        raise NothingToFitError(
            f"tune: every answer to a target prompt shows {judge.name}, even with the plan's directions ablated from "
            "every writer; use other distill steps or other prompts"
        )
    return answered


def continue_openings(subject: Subject, openings: Sequence[Pair], tokens: int, judge: Judge) -> list[Pair]:
    """Let the model continue each answer from one token of its opening, else from two, else from four.

    Returns the answers, ``tokens`` tokens long, that do not show the behavior. A model that has begun to answer may
    still refuse a sentence later.
    """
    answered, decoder = list[Pair](), AnswerDecoder.create(subject)
    for n in OPENING_LENGTHS:
        done = {str(row) for row, _ in answered}
        begun = [(row, opening[:n]) for row, opening in openings if str(row) not in done and len(opening) >= n]
        if begun:
            rest = generate(subject, [row + opening for row, opening in begun], tokens - n, title="TUNE answers")
            pairs = [(row, opening + more) for (row, opening), more in zip(begun, rest, strict=True)]
            answered += [pair for pair in pairs if does_answer(decoder, pair[1], judge)]
    return answered


def does_answer(decoder: AnswerDecoder, answer: list[int], judge: Judge) -> bool:
    """Return whether the answer says something, and does not show the behavior."""
    return judge.judge_answer(decoder.decode(answer)) in ("absent", "unknown")


# ------------------------------------------------------------------------------------- the strongest edit
def ablate_every_writer(subject: Subject, plan: Plan) -> Plan:
    """Return the plan that removes from every writer what the plan removes from the nearest edited writer.

    Strength is 1 and there is no anchor. A plan that edits no writer gives an empty plan.
    """
    edits = [e for e in plan.edits if isinstance(e, Edit) and e.site.role == "writes"]
    if not edits:
        return Plan((), plan.model)

    def nearest_rows(site: Site) -> Float[Tensor, "k width"]:
        edit = min(edits, key=lambda e: (abs(e.site.layer - site.layer), e.site.part != site.part))
        rows = unfold_gain(subject, edit)
        return fold_gain_orthogonal(rows, torch.ones_like(rows[0]))

    return remove_from_writers(subject, nearest_rows)


def unfold_gain(subject: Subject, edit: Edit) -> Float[Tensor, "k width"]:
    """Return the rows that the stream loses: those of the edit without the norm gain that was folded in."""
    gain = read_gain(subject.model, edit.site)
    if gain is None:
        return edit.basis
    gain = gain.to(edit.basis)
    return edit.basis * gain if edit.covectors is not None else edit.basis / gain.where(gain != 0, torch.inf)
