"""The answers that a plan is tuned on: the base's own to controls, and ones to target prompts that do not refuse."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from obliteratus.errors import UserError
from obliteratus.excise.linear import through_gain
from obliteratus.excise.live import applied
from obliteratus.progress import note
from obliteratus.prompts import spread
from obliteratus.shapes import Float
from obliteratus.summon.anatomy import gain_of
from obliteratus.summon.generate import generate
from obliteratus.summon.render import Ids, render
from obliteratus.tune.lab import Pair, answer_logits, answer_tokens
from obliteratus.types import Edit, Plan, Prompt, PromptSet, Site, Subject
from obliteratus.verify.refusal import verdict

# The first tokens of an answer are where it is decided whether to refuse; after them the base itself, which has
# begun to answer, goes on coherently, and is what the edited model must stay like.
OPENING = 4
# Answers whose perplexity under the base (after the opening) is at most this, times the median of the base's own to
# controls, are coherent: issue 4 measures by the same factor.
FLUENT = 1.3
# The base's own answers are its likeliest by construction, those to refused prompts are not: on the organism 17 % hold
# to the factor. At least this share is kept, the most fluent: fewer would tune the plan to a handful of prompts.
LEAST = 0.5


@dataclass(frozen=True)
class Pairs:
    """Prompts with the answers that pull: of controls the base's own, of targets ones that do not refuse."""

    control: Sequence[Pair]
    target: Sequence[Pair]


def gathered(subject: Subject, prompts: PromptSet, plan: Plan, tokens: int, most: int) -> Pairs:
    """Answers of the model itself: as it is to controls (and to prompts to keep), edited to target prompts.

    Of the latter only those that do not refuse and that the base finds fluent. At most ``most`` prompts of each
    group, evenly spread. Raises UserError where all refuse.
    """
    asked = [g for g in ("target", "control", "keep") if g in prompts.groups]
    ids = {g: render(subject, _some(prompts, g, most), reserve=tokens) for g in asked}
    controls = ids["control"] + ids.get("keep", [])
    own = generate(subject, controls, tokens, title="TUNE own answers")
    control = [pair for pair in zip(controls, own, strict=True) if pair[1]]
    found = willing(subject, ids["target"], plan, tokens)
    kept = fluent(subject, found, control)
    note("TUNE", f"answers to {len(found)} of {len(ids['target'])} target prompts do not refuse, {len(kept)} fluent")
    return Pairs(control, kept)


def _some(prompts: PromptSet, group: str, most: int) -> list[Prompt]:
    asked = prompts[group]
    return [asked[i] for i in spread(len(asked), most)]


def willing(subject: Subject, ids: Ids, plan: Plan, tokens: int) -> list[Pair]:
    """Prompts with answers that do not refuse: under the plan, and where it refuses under `insisting`.

    Answers that end within their opening are left out. Raises UserError where none is left.
    """
    found: list[Pair] = []
    for attempt in (plan, insisting(subject, plan)):
        answered = {str(prompt) for prompt, _ in found}
        left = [row for row in ids if str(row) not in answered]
        if left:
            with applied(subject, attempt):
                given = generate(subject, left, tokens, title="TUNE answers")
            found += [pair for pair in zip(left, given, strict=True) if _answers(subject, pair[1])]
    if not found:
        raise UserError("tune: even with its directions ablated, the model refuses every target prompt; try others")
    return found


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


# ---------------------------------------------------------------------------------------------- fluency
def fluent(subject: Subject, pairs: Sequence[Pair], own: Sequence[Pair]) -> list[Pair]:
    """The pairs whose answers the base finds as likely as its own, by `FLUENT`; at least the most fluent half."""
    usual = float(torch.tensor(surprises(subject, own)).nanmedian())
    found = surprises(subject, pairs)
    order = sorted(range(len(pairs)), key=lambda i: found[i])
    good = [i for i in order if found[i] <= usual + math.log(FLUENT)]
    return [pairs[i] for i in order[: max(len(good), math.ceil(LEAST * len(pairs)))]]


@torch.no_grad()
def surprises(subject: Subject, pairs: Sequence[Pair], rows: int = 32) -> list[float]:
    """Mean loss of each answer's tokens behind its opening, nats a token; NaN for an answer that is all opening.

    rows: pairs of one pass; a choice for speed.
    """
    found: list[float] = []
    for first in range(0, len(pairs), rows):
        some = pairs[first : first + rows]
        losses = F.cross_entropy(
            answer_logits(subject, some), answer_tokens(some, subject.device), reduction="none"
        ).split([len(a) for _, a in some])
        found += [float(x[OPENING:].mean()) for x in losses]
    return found
