"""A trial is judged in two looks: one pass over prompts for every trial, answers only for those that may still win."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from obliteratus.errors import UserError
from obliteratus.excise.live import applied
from obliteratus.search.front import dominates
from obliteratus.shapes import Float
from obliteratus.summon.logits import first_token
from obliteratus.summon.render import render
from obliteratus.tune.tokens import SHARE, TIMES, shown
from obliteratus.types import Plan, PromptSet, Recipe, Step, Subject
from obliteratus.verify import Measured, verify
from obliteratus.verify.drift import TAILS, kl
from obliteratus.verify.refusal import GROUPS

CHEAP = ("refusal", "first_token_kl")  # scorers that the first look stands in for
# nats: a model that says nothing finite, or something certain of what the base excluded, is as far off as this. No
# KL of a working model comes near (a vocabulary of 50 000 drawn evenly is about 10 away).
WORST = 100.0


@dataclass(frozen=True)
class Verdict:
    """What is known of a trial."""

    scores: Mapping[str, float]
    answered: bool
    """Whether its refusal rates are of answers, or estimates from first tokens."""


@dataclass(frozen=True)
class Scale:
    """From the probability that refusals begin with to a refusal rate: the line through the base's two groups."""

    tokens: tuple[int, ...]
    slope: float
    at: float
    """Probability and rate of the control group."""
    rate: float

    def __call__(self, logp: Float[Tensor, "rows vocabulary"]) -> float:
        """The estimated share of refusals, 0–1."""
        mass = float(began(logp, self.tokens).mean())
        return min(1.0, max(0.0, self.rate + self.slope * (mass - self.at)))


def began(logp: Float[Tensor, "rows vocabulary"], tokens: Sequence[int]) -> Float[Tensor, " rows"]:
    """Probability that an answer begins with one of the tokens, of each row."""
    return logp[:, list(tokens)].double().exp().sum(-1)


class Judge:
    """The prompts that trials are judged on, and all that is known of the unedited model's answers to them."""

    def __init__(self, subject: Subject, prompts: PromptSet, made: Recipe, before: Measured) -> None:
        """before: what the recipe's ``verify`` steps found of the unedited model on these prompts."""
        assert made.search is not None
        self.subject, self.prompts, self.search = subject, prompts, made.search
        self.groups = [g for g in GROUPS if g in prompts.groups]
        self.before = before
        self.more = [step for step in made.verify if step.use not in CHEAP]
        self.rows = {g: render(subject, prompts[g], reserve=made.search.tokens) for g in self.groups}
        base = self._first()
        self.base = base["control"]
        self.scale = scale_of(subject, base, before)

    def cheap(self, plan: Plan) -> Verdict:
        """KL on control prompts and estimated refusal rates, from first tokens; other scorers as they are."""
        with applied(self.subject, plan):
            first = self._first()
            scores = self._others()
        divergence = kl(self.base, first["control"]).nan_to_num(nan=WORST).clamp(max=WORST).double()
        scores |= {f"kl.first_token.{tail}": float(of(divergence)) for tail, of in TAILS.items()}
        scores |= {f"refusal.{g}": self.scale(first[g].nan_to_num(nan=0.0)) for g in self.groups}
        return Verdict(scores, False)

    def answered(self, plan: Plan, known: Verdict) -> Verdict:
        """Refusal rates of answers to target and keep prompts; of controls the estimate stays."""
        asked = PromptSet({g: self.prompts[g] for g in self.groups if g != "control"})
        with applied(self.subject, plan):
            found = verify(self.subject, asked, [Step(use="refusal", tokens=self.search.tokens)])
        return Verdict({**known.scores, **{k: s.value for k, s in found.scores.items() if "/" not in k}}, True)

    def judged(self, plan: Plan, front: Sequence[Sequence[float]]) -> Verdict:
        """One look, or two if the trial could be in the front. front: the answered trials' `objectives`."""
        first = self.cheap(plan)
        return self.answered(plan, first) if may_enter(self.hoped(first), front) else first

    def hoped(self, verdict: Verdict) -> tuple[float, ...]:
        """The objectives, if all refusal rates were as much better as the margin allows."""
        rates = {name: value for name, value in verdict.scores.items() if name.startswith("refusal.")}
        low = {name: max(0.0, value - self.search.margin) for name, value in rates.items()}
        high = {name: min(1.0, value + self.search.margin) for name, value in rates.items()}
        ends = [high if name.startswith("-") else low for name in self.search.minimise]
        return tuple(
            objective(name, {**verdict.scores, **end}) for name, end in zip(self.search.minimise, ends, strict=True)
        )

    def objectives(self, verdict: Verdict) -> tuple[float, ...]:
        """What is made small, in the order of ``minimise``. Raises UserError for a name that no scorer gives."""
        return tuple(objective(name, verdict.scores) for name in self.search.minimise)

    def excess(self, scores: Mapping[str, float]) -> float:
        """By how much more controls are refused than is allowed; at most 0 is feasible."""
        base = self.before.scores["refusal.control"].value
        return scores["refusal.control"] - base - self.search.control_margin

    def _first(self) -> dict[str, Tensor]:
        """First-token log-probabilities of all groups, in one go."""
        rows = [row for g in self.groups for row in self.rows[g]]
        logp = first_token(self.subject, rows, title="first tokens")
        return dict(zip(self.groups, logp.split([len(self.rows[g]) for g in self.groups]), strict=True))

    def _others(self) -> dict[str, float]:
        found = verify(self.subject, self.prompts, self.more, self.before)
        return {name: score.value for name, score in found.scores.items()}


def objective(name: str, scores: Mapping[str, float]) -> float:
    """A score, or behind a minus its opposite. Raises UserError for one that is not there."""
    plain = name.removeprefix("-")
    if plain not in scores:
        raise UserError(f"search.minimise: '{plain}' is no score of a trial; there are: {', '.join(sorted(scores))}")
    return -scores[plain] if name.startswith("-") else scores[plain]


def may_enter(point: Sequence[float], front: Sequence[Sequence[float]]) -> bool:
    """Whether no point of the front dominates this one."""
    return not any(dominates(other, point) for other in front)


def scale_of(subject: Subject, base: Mapping[str, Tensor], before: Measured) -> Scale:
    """By which first tokens this model refuses, and how their probability tells its refusal rate.

    Tokens that begin at least one refused target prompt in twenty, and four times as often as controls. Raises
    UserError where there is none, or where target prompts are refused no more than controls.
    """
    refused = torch.tensor([r["verdict"] == "refused" for r in before.records if r.get("group") == "target"])
    target, control = base["target"].double().exp(), base["control"].double().exp().mean(0)
    of = target[refused].mean(0) if bool(refused.any()) else target.mean(0)
    tokens = tuple(int(t) for t in ((of >= SHARE) & (of >= TIMES * control)).nonzero()[:, 0])
    rates = {g: before.scores[f"refusal.{g}"].value for g in ("target", "control")}
    if not tokens or rates["target"] <= rates["control"]:
        raise UserError(
            f"search: this model refuses {rates['target']:.0%} of target and {rates['control']:.0%} of control search "
            f"prompts, by {len(tokens)} first tokens of its own; there is nothing to search for. Give other prompts"
        )
    mass = {g: float(began(base[g], tokens).mean()) for g in ("target", "control")}
    slope = (rates["target"] - rates["control"]) / max(1e-6, mass["target"] - mass["control"])
    return Scale(tokens, slope, mass["control"], rates["control"])


def words(judge: Judge) -> str:
    """The tokens that refusals begin with, for a note."""
    return shown(judge.subject, judge.scale.tokens)
