"""Plans that begin at a depth, in one part of the blocks; and what they leave of how a model begins its refusals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from obliteratus.analyze.base import AnalysisContext
from obliteratus.core.errors import NothingMatchedError
from obliteratus.core.results import Score
from obliteratus.core.settings import Excise, Step, expand_part
from obliteratus.core.shapes import Float
from obliteratus.core.types import Directions, Plan, Prompt, PromptSet, Subject
from obliteratus.excise.live.hooks import applied
from obliteratus.excise.plan import plan_edits
from obliteratus.prompts import evenly_spaced
from obliteratus.verify import measure
from obliteratus.verify.openings import SHARE, TIMES

BOTH = "both"
PARTS: Mapping[str, tuple[str, ...]] = {BOTH: ("attn.out", "mlp.out"), "attention": ("attn.out",), "mlp": ("mlp.out",)}


def candidate_first_blocks(n: int, low: float, most: int) -> list[int]:
    """At most so many of the blocks from ``low`` of the depth on, evenly spread; the last one is not left out."""
    blocks = list(range(n))[int(low * n) :][::-1]
    return sorted(blocks[i] for i in evenly_spaced(len(blocks), most))


def parts_present(subject: Subject) -> dict[str, tuple[str, ...]]:
    """The parts that this model's blocks have."""
    there = {site.part for site in subject.sites}
    own = {name: tuple(p for p in of if there & set(expand_part(p))) for name, of in PARTS.items()}
    return {name: of for name, of in own.items() if of}


def plan_from_layer(ground: AnalysisContext, directions: Directions, parts: Sequence[str], layer: int) -> Plan:
    """The directions taken from these parts of blocks ``layer`` and above, as EXCISE would: anchored where anchors were
    probed. No directions there: the model as it is."""
    subject = ground.lab.subject
    weights = torch.tensor([float(site.layer >= layer) for site in subject.sites])
    options = Excise(parts=tuple(parts), anchored=bool(ground.acts.outputs))
    try:
        return plan_edits(subject, directions, weights, ground.acts, options)
    except NothingMatchedError:
        return Plan((), subject.source.digest)


def random_directions(directions: Directions, seed: int) -> Directions:
    """Random directions in place of these, as many at each stream."""
    noise = torch.randn(directions.basis.shape, generator=torch.Generator().manual_seed(seed))
    rows = torch.linalg.qr(normalize(noise, dim=2).transpose(1, 2))[0].transpose(1, 2)
    there = directions.basis.norm(dim=2, keepdim=True) > 0
    return Directions((rows * there).contiguous(), directions.score, directions.raw, "random")


def typical_first_tokens(
    target: Float[Tensor, "rows vocabulary"], control: Float[Tensor, "others vocabulary"]
) -> tuple[int, ...]:
    """First tokens that are typical of target prompts, from log-probabilities; there may be none."""
    one, other = (logp.double().exp().mean(0) for logp in (target, control))
    return tuple(((one >= SHARE) & (one >= TIMES * other)).nonzero()[:, 0].tolist())


def remaining_probability(
    base: Float[Tensor, "rows vocabulary"], edited: Float[Tensor, "rows vocabulary"], size: int, tokens: Sequence[int]
) -> Float[Tensor, " target"]:
    """Of each target prompt: its probability of the tokens, in units of what the groups differ by; 1 without tokens.

    The mean of them is 1 in the model as it is, and 0 where target prompts are as control prompts were. size: how many
    rows are target prompts, which come first.
    """
    if not tokens:
        return torch.ones(size)
    before, after = (logp[:, list(tokens)].double().exp().sum(1) for logp in (base, edited))
    floor = before[size:].mean()
    return ((after[:size] - floor) / (before[:size].mean() - floor)).float()


def refusal_rate_under(subject: Subject, plan: Plan, prompts: Sequence[Prompt], tokens: int) -> Score:
    """Share of target prompts whose answers of so many tokens refuse, under the plan."""
    with applied(subject, plan):
        found = measure(subject, PromptSet({"target": tuple(prompts)}), (Step(use="refusal", tokens=tokens),))
    return found.scores["refusal.target"]
