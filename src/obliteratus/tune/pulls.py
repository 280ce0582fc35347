"""What a tuned plan is pulled by: the base's own answers to controls, and non-refusing answers to target prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from obliteratus.errors import UserError
from obliteratus.excise.live import applied
from obliteratus.shapes import Float
from obliteratus.summon.generate import generate
from obliteratus.summon.render import render
from obliteratus.tune.lab import Pair, answer_logits, answer_tokens
from obliteratus.tune.losses import Own
from obliteratus.types import Plan, PromptSet, Subject
from obliteratus.verify.refusal import verdict

# The first tokens of an answer are where it is decided whether to refuse; after them the base itself, which has
# begun to answer, goes on coherently, and is what the edited model must stay like.
OPENING = 4
# Answers whose perplexity under the base (after the opening) is at most this, times the median of the base's own to
# controls, are coherent: issue 4 measures by the same factor.
FLUENT = 1.3
LEAST = 8  # fewer answers than this are no sample; then the most fluent so many are taken


@dataclass(frozen=True)
class Pairs:
    """Prompts with the answers that pull: of controls the base's own, of targets ones that do not refuse."""

    control: Sequence[Pair]
    target: Sequence[Pair]


@dataclass(frozen=True)
class Pull:
    """How far a plan is off, nats a token."""

    kl: Float[Tensor, ""]
    """KL(base ‖ edited): of controls' first tokens, plus of all tokens of their answers."""
    hinge: Float[Tensor, ""]
    """Mean over target prompts of what their answers' opening costs above the level: 0 once none refuses."""
    drift: Float[Tensor, ""]
    """KL(base ‖ edited) of target prompts' answers behind their opening: degenerate answers show here."""

    def total(self, weight: float) -> Float[Tensor, ""]:
        """What is made small."""
        return self.kl + weight * self.hinge + self.drift


def gathered(subject: Subject, prompts: PromptSet, plan: Plan, tokens: int) -> Pairs:
    """Answers of the model itself: as it is to controls (and to prompts to keep), under the plan to target prompts.

    Of the latter only those that do not refuse and that the base finds fluent. Raises UserError where all refuse.
    """
    ids = {g: render(subject, prompts[g], reserve=tokens) for g in ("target", "control")}
    if "keep" in prompts.groups:
        ids["control"] += render(subject, prompts["keep"], reserve=tokens)
    own = generate(subject, ids["control"], tokens, title="TUNE own answers")
    with applied(subject, plan):
        given = generate(subject, ids["target"], tokens, title="TUNE answers")
    control = [pair for pair in zip(ids["control"], own, strict=True) if pair[1]]
    texts = [subject.tokenizer.decode(a, skip_special_tokens=True) for a in given]
    pairs = zip(ids["target"], given, texts, strict=True)
    willing = [(p, a) for p, a, text in pairs if len(a) > OPENING and verdict(text) == "complied"]
    if not willing:
        raise UserError(
            "tune: under the plan that it starts from, every target prompt is still refused; start stronger"
        )
    return Pairs(control, fluent(subject, willing, control))


def fluent(subject: Subject, pairs: Sequence[Pair], own: Sequence[Pair]) -> list[Pair]:
    """The pairs whose answers the base finds as likely as its own, by `FLUENT`; at least the `LEAST` most fluent."""
    usual = torch.tensor(surprises(subject, own)).nanmedian()
    found = surprises(subject, pairs)
    order = sorted(range(len(pairs)), key=lambda i: found[i])
    good = [i for i in order if found[i] <= float(usual) + torch.tensor(FLUENT).log()]
    return [pairs[i] for i in (good if len(good) >= LEAST else order[:LEAST])]


@torch.no_grad()
def surprises(subject: Subject, pairs: Sequence[Pair], rows: int = 32) -> list[float]:
    """Mean loss of each answer's tokens behind its opening, nats a token; NaN for an answer that is all opening.

    rows: pairs of one pass; a choice for speed.
    """
    found: list[float] = []
    for first in range(0, len(pairs), rows):
        some = pairs[first : first + rows]
        losses = _losses(subject, some).split([len(a) for _, a in some])
        found += [float(x[OPENING:].mean()) for x in losses]
    return found


def _losses(subject: Subject, pairs: Sequence[Pair]) -> Float[Tensor, " tokens"]:
    return F.cross_entropy(answer_logits(subject, pairs), answer_tokens(pairs, subject.device), reduction="none")


def pull_control(subject: Subject, own: Own, plan: Plan, pairs: Sequence[Pair]) -> Float[Tensor, ""]:
    """`Pull.kl` of some controls."""
    each = divergence(subject, own, plan, pairs)
    first = [part[0] for part in each.split([len(a) for _, a in pairs])]
    return torch.stack(first).mean() + each.mean()


def pull_target(subject: Subject, own: Own, plan: Plan, pairs: Sequence[Pair], level: float) -> tuple[Tensor, Tensor]:
    """`Pull.hinge` and `Pull.drift` of some target prompts, from one pass."""
    base = own.logp(pairs)
    with applied(subject, plan):
        found = answer_logits(subject, pairs).log_softmax(-1)
    tokens = answer_tokens(pairs, subject.device)
    sizes = [len(a) for _, a in pairs]
    losses = (-found.gather(1, tokens[:, None])[:, 0]).split(sizes)
    hinges = torch.stack([F.relu(x[:OPENING].mean() - level) for x in losses])
    drifts = F.kl_div(found, base, reduction="none", log_target=True).sum(-1).split(sizes)
    return hinges.mean(), torch.cat([x[OPENING:] for x in drifts]).mean()


def divergence(subject: Subject, own: Own, plan: Plan, pairs: Sequence[Pair]) -> Float[Tensor, " tokens"]:
    """KL(base ‖ edited) at each token of the answers, nats."""
    base = own.logp(pairs)
    with applied(subject, plan):
        found = answer_logits(subject, pairs).log_softmax(-1)
    return F.kl_div(found, base, reduction="none", log_target=True).sum(-1)
