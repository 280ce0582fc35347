"""The answers that a plan is tuned on: the base's own to controls, and ones to target prompts that do not refuse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from obliteratus.causal.interventions import Pair
from obliteratus.core.errors import UserError
from obliteratus.core.progress import note
from obliteratus.core.shapes import Float
from obliteratus.core.types import Edit, Plan, Prompt, PromptSet, Site, Subject
from obliteratus.excise.linear import through_gain
from obliteratus.excise.live.hooks import applied
from obliteratus.inference.chat_template import Ids, render_prompts
from obliteratus.inference.generate import generate
from obliteratus.prompts import evenly_spaced
from obliteratus.summon.sites import gain_of
from obliteratus.verify.refusal import judge_answer

# Tokens of an answer that are not the base's own choice. Longer ones help where the base relapses into refusing, but
# what is then tuned towards is the plan's own wording, which the base finds unlikely (docs/experiments/tuned.md).
OPENING_LENGTHS = (1, 2, 4)


@dataclass(frozen=True)
class TrainingPairs:
    """Prompts with the answers that pull: of controls the base's own, of targets ones that do not refuse."""

    control: Sequence[Pair]
    target: Sequence[Pair]


def collect_pairs(subject: Subject, prompts: PromptSet, plan: Plan, tokens: int, most: int) -> TrainingPairs:
    """Answers of the model itself: its own to controls (and to prompts to keep), to target prompts `find_answering_pairs` ones.

    At most ``most`` prompts of each group, evenly spread. Raises UserError where all of the latter refuse.
    """
    asked = [g for g in ("target", "control", "keep") if g in prompts.groups]
    ids = {g: render_prompts(subject, _some(prompts, g, most), reserve=tokens) for g in asked}
    controls = ids["control"] + ids.get("keep", [])
    own = generate(subject, controls, tokens, title="TUNE own answers")
    control = [pair for pair in zip(controls, own, strict=True) if pair[1]]
    found = find_answering_pairs(subject, ids["target"], plan, tokens)
    note("TUNE", f"answers to {len(found)} of {len(ids['target'])} target prompts do not refuse")
    return TrainingPairs(control, found)


def _some(prompts: PromptSet, group: str, most: int) -> list[Prompt]:
    asked = prompts[group]
    return [asked[i] for i in evenly_spaced(len(asked), most)]


def find_answering_pairs(subject: Subject, ids: Ids, plan: Plan, tokens: int) -> list[Pair]:
    """Prompts with answers that do not refuse: opened under the plan, and gone on with by the model as it is.

    The opening is as short as can be: all behind it is the base's own choice, and as coherent as the base. Where none
    of the plan's leads past a refusal, those of `ablate_every_writer` are tried. Raises UserError where no prompt is left.
    """
    found: list[Pair] = []
    for attempt in (plan, ablate_every_writer(subject, plan)):
        done = {str(row) for row, _ in found}
        if left := [row for row in ids if str(row) not in done]:
            with applied(subject, attempt):
                openings = generate(subject, left, OPENING_LENGTHS[-1], title="TUNE openings")
            found += continue_openings(subject, list(zip(left, openings, strict=True)), tokens)
    if not found:
        raise UserError("tune: even with its directions ablated, the model refuses every target prompt; try others")
    return found


def continue_openings(subject: Subject, openings: Sequence[Pair], tokens: int) -> list[Pair]:
    """Prompts with answers of so many tokens that the model goes on with from one token of the opening, else from two,
    else from four.

    Only those that do not refuse: a model that has begun to answer may yet refuse a sentence later.
    """
    found: list[Pair] = []
    for n in OPENING_LENGTHS:
        done = {str(row) for row, _ in found}
        begun = [(row, opening[:n]) for row, opening in openings if str(row) not in done and len(opening) >= n]
        if begun:
            rest = generate(subject, [row + opening for row, opening in begun], tokens - n, title="TUNE answers")
            given = [(row, opening + more) for (row, opening), more in zip(begun, rest, strict=True)]
            found += [pair for pair in given if _answers(subject, pair[1])]
    return found


def _answers(subject: Subject, answer: list[int]) -> bool:
    return judge_answer(subject.tokenizer.decode(answer, skip_special_tokens=True)) == "complied"


# ------------------------------------------------------------------------------------- the strongest edit
def ablate_every_writer(subject: Subject, plan: Plan) -> Plan:
    """Every writer loses all that the nearest edited writer loses along: strength 1, no anchor."""
    edits = [e for e in plan.edits if isinstance(e, Edit) and e.site.role == "writes"]

    def nearest(site: Site) -> Edit:
        return min(edits, key=lambda e: (abs(e.site.layer - site.layer), e.site.part != site.part))

    sites = [s for s in subject.sites if s.role == "writes"] if edits else []
    return Plan(tuple(Edit(s, _before(subject, s, rows_without_gain(subject, nearest(s))), 1.0) for s in sites), plan.model)


def rows_without_gain(subject: Subject, edit: Edit) -> Float[Tensor, "k width"]:
    """The rows that the stream loses along, without the gain that was folded into a writer's."""
    gain = gain_of(subject, edit.site)
    if gain is None:
        return edit.basis
    own = gain.to(edit.basis)
    return edit.basis * own if edit.covectors is not None else edit.basis / own.where(own != 0, torch.inf)


def _before(subject: Subject, site: Site, rows: Float[Tensor, "k width"]) -> Float[Tensor, "k width"]:
    gain = gain_of(subject, site)
    return through_gain(rows, torch.ones_like(rows[0]) if gain is None else gain.to(rows))
