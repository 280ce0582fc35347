"""The answers that a plan is tuned on: the base's own to controls, and ones to target prompts that do not refuse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from obliteratus.errors import UserError
from obliteratus.excise.linear import through_gain
from obliteratus.excise.live import applied
from obliteratus.progress import note
from obliteratus.prompts import spread
from obliteratus.shapes import Float
from obliteratus.summon.anatomy import gain_of
from obliteratus.summon.generate import generate
from obliteratus.summon.render import Ids, render
from obliteratus.tune.lab import Pair
from obliteratus.types import Edit, Plan, Prompt, PromptSet, Site, Subject
from obliteratus.verify.refusal import verdict

# The first tokens of an answer are where it is decided whether to refuse; after them the base itself, which has
# begun to answer, goes on coherently, and is what the edited model must stay like.
OPENING = 4


@dataclass(frozen=True)
class Pairs:
    """Prompts with the answers that pull: of controls the base's own, of targets ones that do not refuse."""

    control: Sequence[Pair]
    target: Sequence[Pair]


def gathered(subject: Subject, prompts: PromptSet, plan: Plan, tokens: int, most: int) -> Pairs:
    """Answers of the model itself: its own to controls (and to prompts to keep), to target prompts `willing` ones.

    At most ``most`` prompts of each group, evenly spread. Raises UserError where all of the latter refuse.
    """
    asked = [g for g in ("target", "control", "keep") if g in prompts.groups]
    ids = {g: render(subject, _some(prompts, g, most), reserve=tokens) for g in asked}
    controls = ids["control"] + ids.get("keep", [])
    own = generate(subject, controls, tokens, title="TUNE own answers")
    control = [pair for pair in zip(controls, own, strict=True) if pair[1]]
    found = willing(subject, ids["target"], plan, tokens)
    note("TUNE", f"answers to {len(found)} of {len(ids['target'])} target prompts do not refuse")
    return Pairs(control, found)


def _some(prompts: PromptSet, group: str, most: int) -> list[Prompt]:
    asked = prompts[group]
    return [asked[i] for i in spread(len(asked), most)]


def willing(subject: Subject, ids: Ids, plan: Plan, tokens: int) -> list[Pair]:
    """Prompts with answers that do not refuse: opened under the plan, and gone on with by the model as it is.

    So all behind the opening is the base's own choice, and as coherent as the base. Where the plan's opening leads to
    a refusal, that of `insisting` is tried. Answers that end within their opening are left out. Raises UserError where
    none is left.
    """
    found: list[Pair] = []
    for attempt in (plan, insisting(subject, plan)):
        answered = {str(prompt) for prompt, _ in found}
        left = [row for row in ids if str(row) not in answered]
        if left:
            given = opened(subject, left, attempt, tokens)
            found += [pair for pair in zip(left, given, strict=True) if _answers(subject, pair[1])]
    if not found:
        raise UserError("tune: even with its directions ablated, the model refuses every target prompt; try others")
    return found


def opened(subject: Subject, ids: Ids, plan: Plan, tokens: int) -> Ids:
    """Answers of so many tokens whose first `OPENING` are written under the plan, and the others without it."""
    with applied(subject, plan):
        openings = generate(subject, ids, OPENING, title="TUNE openings")
    begun = [row + opening for row, opening in zip(ids, openings, strict=True)]
    rest = generate(subject, begun, tokens - OPENING, title="TUNE answers")
    return [
        opening + more if len(opening) == OPENING else opening for opening, more in zip(openings, rest, strict=True)
    ]


def _answers(subject: Subject, answer: list[int]) -> bool:
    text = subject.tokenizer.decode(answer, skip_special_tokens=True)
    return len(answer) > OPENING and verdict(text) == "complied"


# ------------------------------------------------------------------------------------- the strongest edit
def insisting(subject: Subject, plan: Plan) -> Plan:
    """Every writer loses all that the nearest edited writer loses along: strength 1, no anchor."""
    edits = [e for e in plan.edits if isinstance(e, Edit) and e.site.role == "writes"]

    def nearest(site: Site) -> Edit:
        return min(edits, key=lambda e: (abs(e.site.layer - site.layer), e.site.part != site.part))

    sites = [s for s in subject.sites if s.role == "writes"] if edits else []
    return Plan(tuple(Edit(s, _before(subject, s, in_stream(subject, nearest(s))), 1.0) for s in sites), plan.model)


def in_stream(subject: Subject, edit: Edit) -> Float[Tensor, "k width"]:
    """The rows that the stream loses along, without the gain that was folded into a writer's."""
    gain = gain_of(subject, edit.site)
    if gain is None:
        return edit.basis
    own = gain.to(edit.basis)
    return edit.basis * own if edit.covectors is not None else edit.basis / own.where(own != 0, torch.inf)


def _before(subject: Subject, site: Site, rows: Float[Tensor, "k width"]) -> Float[Tensor, "k width"]:
    gain = gain_of(subject, site)
    return through_gain(rows, torch.ones_like(rows[0]) if gain is None else gain.to(rows))
