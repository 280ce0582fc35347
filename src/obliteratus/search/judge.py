"""A trial is judged in two looks: one pass over prompts for every trial, answers only for those that may still win."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from obliteratus.core.errors import UserError
from obliteratus.core.settings import Recipe
from obliteratus.core.shapes import Float
from obliteratus.core.types import Plan, PromptSet, Subject
from obliteratus.excise.live.hooks import applied
from obliteratus.inference.cached_prompts import CachedPrompts
from obliteratus.inference.chat_template import Ids, render_prompts
from obliteratus.inference.logits import kl_divergence
from obliteratus.inference.memory import free_memory
from obliteratus.search.front import dominates
from obliteratus.verify import Measurement, measure
from obliteratus.verify.drift import TAILS
from obliteratus.verify.openings import SHARE, TIMES, openings_to_text
from obliteratus.verify.refusal import GROUPS, judge_answer, refuses_already
from obliteratus.verify.refusal import Verdict as Kind

CHEAP = ("refusal", "first_token_kl")  # scorers that the first look stands in for
# nats: a model that says nothing finite, or something certain of what the base excluded, is as far off as this. No
# KL of a working model comes near (a vocabulary of 50 000 drawn evenly is about 10 away).
WORST = 100.0
Scores = Mapping[str, float]
Worth = Callable[[Scores, Scores], bool]
"""(what the first look says, what refusal rates are at least by the answers so far) → whether to go on."""
# Of the weights' bytes, what the blocks below trials' edits made of the prompts may take: a search is to stay within
# 1.2 times the loaded model, answers' keys and values included. Under a memory budget, a quarter of what is left.
KEPT, OF_FREE = 0.1, 0.25


@dataclass(frozen=True)
class TrialVerdict:
    """What is known of a trial."""

    scores: Mapping[str, float]
    answered: bool
    """Whether its refusal rates are of answers, or estimates from first tokens."""


@dataclass(frozen=True)
class RefusalScale:
    """From the probability that refusals begin with to a refusal rate: the line through the base's two groups."""

    tokens: tuple[int, ...]
    slope: float
    at: float
    """Probability and rate of the control group."""
    rate: float

    def __call__(self, logp: Float[Tensor, "rows vocabulary"]) -> float:
        """The estimated share of refusals, 0–1."""
        mass = float(opening_probability(logp, self.tokens).mean())
        return min(1.0, max(0.0, self.rate + self.slope * (mass - self.at)))


def opening_probability(logp: Float[Tensor, "rows vocabulary"], tokens: Sequence[int]) -> Float[Tensor, " rows"]:
    """Probability that an answer begins with one of the tokens, of each row."""
    return logp[:, list(tokens)].double().exp().sum(-1)


class TrialJudge:
    """The prompts that trials are judged on, and all that is known of the unedited model's answers to them."""

    def __init__(self, subject: Subject, prompts: PromptSet, made: Recipe, before: Measurement) -> None:
        """before: what the recipe's ``verify`` steps found of the unedited model on these prompts."""
        assert made.search is not None
        self.subject, self.prompts, self.search = subject, prompts, made.search
        self.groups = [g for g in GROUPS if g in prompts.groups]
        self.before = before
        self.more = [step for step in made.verify if step.use not in CHEAP]
        self.rows = {g: render_prompts(subject, prompts[g], reserve=made.search.tokens) for g in self.groups}
        self.asked = [g for g in self.groups if g != "control"]
        weights = sum(p.numel() * p.element_size() for p in subject.model.parameters())
        room = min(KEPT * weights, OF_FREE * free_memory(subject))
        self.control = CachedPrompts(
            subject, self.rows["control"], budget=room / 3, answers=()
        )  # keeps no keys and values
        self.target = CachedPrompts(subject, [row for g in self.asked for row in self.rows[g]], budget=room)
        base = self._split(self.target.first_token()) | {"control": self.control.first_token()}
        self.base = base["control"]
        self.scale = fit_refusal_scale(subject, base, before)

    def judged(self, plan: Plan, front: Sequence[Sequence[float]]) -> TrialVerdict:
        """One look, or two if the trial could be in the front. front: the answered trials' `objectives`."""
        return self.looked(plan, lambda known, decided: self.may_enter(known, decided, front))

    def cheap(self, plan: Plan) -> TrialVerdict:
        """The first look: KL on control prompts, refusal rates estimated from first tokens, other scorers."""
        return self.looked(plan, lambda known, decided: False)

    def answered(self, plan: Plan) -> TrialVerdict:
        """Both looks: refusal rates of answers to target and keep prompts; of controls the estimate stays."""
        return self.looked(plan, lambda known, decided: True)

    def looked(self, plan: Plan, worth: Worth) -> TrialVerdict:
        """The first look, and the second while ``worth`` wants it: answers go on from the first tokens' pass.

        Of a second look that is given up, the refusals seen are known: no rate is told that is below them.
        """
        seen: dict[str, float] = {}
        with applied(self.subject, plan):
            known = self._controls()

            def go_on(logp: Tensor) -> bool:
                known.update({f"refusal.{g}": self._rate(part) for g, part in self._split(logp).items()})
                return worth(known, seen)

            def still(decided: Collection[int]) -> bool:
                seen.update(self._shares(decided))
                return worth(known, seen)

            answers = self.target.generate(self.search.tokens, done=self._over, go_on=go_on, worth=still)
        told = self._told(answers) if answers else {name: max(known[name], rate) for name, rate in seen.items()}
        return TrialVerdict(known | told, bool(answers))

    def _controls(self) -> dict[str, float]:
        """What control prompts' first tokens say, and the scorers that the first look does not stand in for."""
        control = self.control.first_token()
        divergence = kl_divergence(self.base, control).nan_to_num(nan=WORST).clamp(max=WORST).double()
        known = {f"kl.first_token.{tail}": float(of(divergence)) for tail, of in TAILS.items()}
        known["refusal.control"] = self._rate(control)
        return known | (self._others() if self._wants_others(known) else {})

    def _over(self, new: list[int]) -> bool:
        return refuses_already(self.subject, new)

    def _rate(self, logp: Float[Tensor, "rows vocabulary"]) -> float:
        return self.scale(logp.nan_to_num(nan=0.0))

    def _split(self, rows: Tensor) -> dict[str, Tensor]:
        """Rows of the second trunk by group."""
        return dict(zip(self.asked, rows.split([len(self.rows[g]) for g in self.asked]), strict=True))

    def _told(self, answers: Ids) -> dict[str, float]:
        """Shares of refusals and of degenerate answers, by group."""
        verdicts = [judge_answer(self.subject.tokenizer.decode(a, skip_special_tokens=True)) for a in answers]
        kinds: dict[str, Kind] = {"refusal": "refused", "degenerate": "degenerate"}
        return {
            f"{name}.{g}": verdicts[rows.start : rows.stop].count(kind) / len(rows)
            for g, rows in self._rows_of().items()
            for name, kind in kinds.items()
        }

    def _shares(self, decided: Collection[int]) -> dict[str, float]:
        """Of each group's rows, how many have refused already."""
        return {f"refusal.{g}": sum(row in rows for row in decided) / len(rows) for g, rows in self._rows_of().items()}

    def _rows_of(self) -> dict[str, range]:
        """Where each group stands in the second trunk."""
        ends = accumulate(len(self.rows[g]) for g in self.asked)
        return {g: range(end - len(self.rows[g]), end) for g, end in zip(self.asked, ends, strict=True)}

    def may_enter(self, known: Scores, seen: Scores, front: Sequence[Sequence[float]]) -> bool:
        """Whether a trial could be in the front, for all that its first look and the answers so far say.

        seen: by score, what a refusal rate is at least. A trial that would leave more refusals of target prompts than
        ``worth`` allows is no use to anybody; it is answered only while there is no front.
        """
        best = self.hoped(known, seen)
        aims = dict(zip(self.search.minimise, best, strict=True))
        enough = self.search.worth * self.before.scores["refusal.target"].value
        useful = not front or aims.get("refusal.target", 0.0) <= enough
        return useful and not any(dominates(other, best) for other in front)

    def hoped(self, known: Scores, seen: Scores) -> tuple[float, ...]:
        """The objectives, if all refusal rates were as much better as the margin and the answers so far allow."""
        rates = {name: value for name, value in known.items() if name.startswith("refusal.")}
        low = {name: max(0.0, value - self.search.margin, seen.get(name, 0.0)) for name, value in rates.items()}
        high = {name: min(1.0, max(value + self.search.margin, seen.get(name, 0.0))) for name, value in rates.items()}
        ends = [high if name.startswith("-") else low for name in self.search.minimise]
        return tuple(
            objective_value(name, {**known, **end}) for name, end in zip(self.search.minimise, ends, strict=True)
        )

    def objectives(self, verdict: TrialVerdict) -> tuple[float, ...]:
        """What is made small, in the order of ``minimise``. Raises UserError for a name that no scorer gives."""
        return tuple(objective_value(name, verdict.scores) for name in self.search.minimise)

    def excess(self, scores: Mapping[str, float]) -> float:
        """By how much more controls are refused than is allowed; at most 0 is feasible."""
        base = self.before.scores["refusal.control"].value
        return scores["refusal.control"] - base - self.search.control_margin

    def _wants_others(self, known: Mapping[str, float]) -> bool:
        """Whether an objective is none of the first look's: the other scorers cost passes of their own."""
        given = {*known, *(f"refusal.{g}" for g in self.groups)}
        return any(name.removeprefix("-") not in given for name in self.search.minimise)

    def _others(self) -> dict[str, float]:
        found = measure(self.subject, self.prompts, self.more, self.before)
        return {name: score.value for name, score in found.scores.items()}


def objective_value(name: str, scores: Mapping[str, float]) -> float:
    """A score, or behind a minus its opposite. Raises UserError for one that is not there."""
    plain = name.removeprefix("-")
    if plain not in scores:
        raise UserError(f"search.minimise: '{plain}' is no score of a trial; there are: {', '.join(sorted(scores))}")
    return -scores[plain] if name.startswith("-") else scores[plain]


def fit_refusal_scale(subject: Subject, base: Mapping[str, Tensor], before: Measurement) -> RefusalScale:
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
    mass = {g: float(opening_probability(base[g], tokens).mean()) for g in ("target", "control")}
    slope = (rates["target"] - rates["control"]) / max(1e-6, mass["target"] - mass["control"])
    return RefusalScale(tokens, slope, mass["control"], rates["control"])


def opening_texts(judge: TrialJudge) -> str:
    """The tokens that refusals begin with, for a note."""
    return openings_to_text(judge.subject, judge.scale.tokens)
