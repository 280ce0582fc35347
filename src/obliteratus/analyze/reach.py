"""From which depth on removing the directions ends the behaviour, and what that costs: by live edits, part by part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from obliteratus.analyze.along import BLUE, GREEN, GREY, GROUPS, ORANGE
from obliteratus.analyze.base import Ground, analyses
from obliteratus.errors import NothingMatchedError
from obliteratus.excise.live_rows import applied_rows
from obliteratus.excise.plan import excise
from obliteratus.progress import SILENT, progress, reporting
from obliteratus.prompts import spread
from obliteratus.results import Score
from obliteratus.settings import Excise, asked
from obliteratus.shapes import Float
from obliteratus.summon.render import render
from obliteratus.summon.trunk import Trunk
from obliteratus.tune.tokens import SHARE, TIMES
from obliteratus.types import Directions, Plan, Subject
from obliteratus.verify.drift import kl
from obliteratus.verify.intervals import bootstrap, mean
from obliteratus.work import Cost, amount, n_of, number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BOTH, RANDOM = "both", "random"
PARTS: Mapping[str, tuple[str, ...]] = {BOTH: ("attn.out", "mlp.out"), "attention": ("attn.out",), "mlp": ("mlp.out",)}
COLOURS = {BOTH: BLUE, "attention": ORANGE, "mlp": GREEN, RANDOM: GREY}
# Bytes of what the blocks below each edit gave, kept for the next depths: 48 short prompts of a small model take 15 MB.
KEPT = 50e6
HALF = 0.5  # of the behaviour


@dataclass(frozen=True)
class Reach:
    """Of held-out prompts' first tokens, with the directions taken from what blocks from a depth on write."""

    depths: tuple[int, ...]
    """First block that is edited; all above it are too."""
    left: Mapping[str, tuple[Score, ...]]
    """By part (``both``, ``attention``, ``mlp``, and ``random``: random directions in both) and depth: what is left
    of the behaviour, 1 as in the model as it is, 0 as of control prompts in it; with bootstrap intervals over target
    prompts."""
    kl: Mapping[str, tuple[Score, ...]]
    """KL(as it is ‖ edited) on control prompts, nats."""
    tokens: tuple[str, ...]
    """By which first tokens the model does on target prompts what it does not on control prompts. None: nothing to
    look for, and all is left."""

    @property
    def found(self) -> tuple[int, ...]:
        """Depths from which removal in attention and MLP ends more than half of the behaviour, and random removal less:
        the intervals lie apart."""
        rows = zip(self.depths, self.left[BOTH], self.left[RANDOM], strict=True)
        return tuple(d for d, own, other in rows if own.high < min(HALF, other.low))

    @property
    def parts(self) -> tuple[str, ...]:
        """Those of the model's own directions."""
        return tuple(part for part in self.left if part != RANDOM)

    def works(self, part: str) -> bool:
        """Whether removal in this part alone ends any of the behaviour, beyond its interval, from some depth on."""
        return any(score.high < 1 for score in self.left.get(part, ()))

    def numbers(self) -> dict[str, Any]:
        """What is left, and what it costs, by part and depth, with intervals."""
        tables = {"left": self.left, "kl": self.kl}
        told = {
            name: {part: [s.model_dump() for s in row] for part, row in table.items()} for name, table in tables.items()
        }
        return {"depths": list(self.depths), **told, "tokens": list(self.tokens), "found": list(self.found)}

    def told(self) -> str:
        """How deep edits may begin."""
        if not self.found:
            return "removing the directions ends the behaviour from no depth on"
        last = max(self.found)
        left, cost = (table[BOTH][self.depths.index(last)].value for table in (self.left, self.kl))
        return (
            f"removal still works from block {last} on: {100 * max(left, 0):.0f} % of the behaviour is left, "
            f"at KL {cost:.2g} on controls (from block {self.depths[0]}: {self.kl[BOTH][0].value:.2g})"
        )

    def draw(self, figure: Figure) -> None:
        """What is left, and below it what it costs, by depth."""
        for row, (table, label) in enumerate(((self.left, "behaviour left"), (self.kl, "KL on controls (nats)")), 1):
            axes = figure.add_subplot(2, 1, row, xlabel="first edited block", ylabel=label)
            for part, scores in table.items():
                values = [s.value for s in scores]
                bars = [[s.value - s.low for s in scores], [s.high - s.value for s in scores]]
                axes.errorbar(self.depths, values, yerr=bars, fmt="o-", color=COLOURS[part], label=part, capsize=2)
            if row == 1:
                axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(table))


def _cost(options: Mapping[str, Any]) -> Cost:
    each = sum((n_of("search", group, options["prompts"]) for group in GROUPS), number(0))
    return Cost(each * (number(1) + amount("L", options["depths"]) * (len(PARTS) + 1)))


@analyses.register("reach", cite="arXiv:2406.11717", cost=_cost)
def reach(
    ground: Ground,
    *,
    prompts: Annotated[int, Field(ge=2)] = 24,
    depths: Annotated[int, Field(ge=1)] = 10,
    seed: int = 0,
) -> Reach:
    """How deep edits may begin and still end the behaviour, in attention, in the MLPs, or in both.

    The ground's own directions, oblique ones too, are taken from all that blocks from a depth on write, by live edits,
    anchored where anchors were probed; the blocks below are not run again. What is left is read off the probability of
    the first tokens that this model refuses with: those of at least one target prompt in twenty, four times as likely
    as on control prompts. The same is done with random directions in their place. prompts: search prompts of each
    group, at most. depths: how many first blocks are tried, evenly spread.
    """
    subject, layers = ground.lab.subject, spread(ground.lab.subject.n_layers, depths)
    some = {g: [ground.held[g][i] for i in spread(len(ground.held[g]), prompts)] for g in GROUPS}
    size = len(some["target"])
    trunk = Trunk(subject, [row for g in GROUPS for row in render(subject, some[g])], budget=KEPT, answers=())
    base = trunk.first_token()
    tokens = begins(base[:size], base[size:])
    parts, found = parted(subject), []
    with progress("ANALYZE reach", len(layers)) as advance, reporting(SILENT):
        for layer in layers:
            plans = _plans(ground, parts, layer, seed)
            with applied_rows(subject, plans, [i for i in range(len(plans)) for _ in base]):
                found.append(trunk.times(len(plans)).first_token().view(len(plans), len(base), -1))
            advance(1)
    words = tuple(subject.tokenizer.decode([t]) for t in tokens)
    return measured(base, found, (tuple(layers), (*parts, RANDOM)), size, tokens, words)


def parted(subject: Subject) -> dict[str, tuple[str, ...]]:
    """The parts that this model's blocks have."""
    there = {site.part for site in subject.sites}
    own = {name: tuple(p for p in of if there & set(asked(p))) for name, of in PARTS.items()}
    return {name: of for name, of in own.items() if of}


def _plans(ground: Ground, parts: Mapping[str, tuple[str, ...]], layer: int, seed: int) -> list[Plan]:
    """Of each part, then of random directions in both: from the block on. No directions there: the model as it is."""
    own = [_plan(ground, ground.directions, of, layer) for of in parts.values()]
    return [*own, _plan(ground, drawn(ground.directions, seed), parts[BOTH], layer)]


def _plan(ground: Ground, directions: Directions, parts: Sequence[str], layer: int) -> Plan:
    subject = ground.lab.subject
    weights = torch.tensor([float(site.layer >= layer) for site in subject.sites])
    options = Excise(parts=tuple(parts), anchored=bool(ground.acts.outputs))
    try:
        return excise(subject, directions, weights, ground.acts, options)
    except NothingMatchedError:
        return Plan((), subject.source.digest)


def drawn(directions: Directions, seed: int) -> Directions:
    """Random directions in place of these, as many at each stream."""
    noise = torch.randn(directions.basis.shape, generator=torch.Generator().manual_seed(seed))
    rows = torch.linalg.qr(normalize(noise, dim=2).transpose(1, 2))[0].transpose(1, 2)
    there = directions.basis.norm(dim=2, keepdim=True) > 0
    return Directions((rows * there).contiguous(), directions.score, directions.raw, "random")


# ------------------------------------------------------------------------------------------ numbers
def begins(target: Float[Tensor, "rows vocabulary"], control: Float[Tensor, "others vocabulary"]) -> tuple[int, ...]:
    """First tokens that are typical of target prompts, from log-probabilities; there may be none."""
    one, other = (logp.double().exp().mean(0) for logp in (target, control))
    return tuple(((one >= SHARE) & (one >= TIMES * other)).nonzero()[:, 0].tolist())


def measured(
    base: Float[Tensor, "rows vocabulary"],
    edited: Sequence[Float[Tensor, "plans rows vocabulary"]],
    labels: tuple[tuple[int, ...], tuple[str, ...]],
    size: int,
    tokens: tuple[int, ...],
    words: tuple[str, ...],
) -> Reach:
    """Log-probabilities of the first token, by depth and plan, made shares and divergences.

    labels: depths and parts. size: of the target prompts, which come first. tokens: of the behaviour.
    """
    depths, parts = labels
    left: dict[str, tuple[Score, ...]] = {}
    cost: dict[str, tuple[Score, ...]] = {}
    for i, part in enumerate(parts):
        rows = [logp[i] for logp in edited]
        left[part] = tuple(bootstrap(remains(base, logp, size, tokens), mean, "share left") for logp in rows)
        cost[part] = tuple(bootstrap(kl(base[size:], logp[size:]), mean, "nats") for logp in rows)
    return Reach(depths, left, cost, words)


def remains(
    base: Float[Tensor, "rows vocabulary"], edited: Float[Tensor, "rows vocabulary"], size: int, tokens: Sequence[int]
) -> Float[Tensor, " target"]:
    """Of each target prompt: its probability of the tokens, in units of what the groups differ by; 1 without tokens.

    The mean of them is 1 in the model as it is, and 0 where target prompts are as control prompts were.
    """
    if not tokens:
        return torch.ones(size)
    before, after = (logp[:, list(tokens)].double().exp().sum(1) for logp in (base, edited))
    floor = before[size:].mean()
    return ((after[:size] - floor) / (before[:size].mean() - floor)).float()
