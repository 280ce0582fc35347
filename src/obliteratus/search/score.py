"""Score trials in two steps: a cheap estimate for every trial, answers only for trials that could enter the front.

The estimate takes one pass over the prompts: first-token KL on control prompts, and rates of the behavior predicted
from the probability of the first tokens that it begins with in this model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from obliteratus.core.errors import UserError
from obliteratus.core.pareto import dominates
from obliteratus.core.settings import KL_TARGETED, Recipe, Step
from obliteratus.core.shapes import Float
from obliteratus.core.types import Plan, PromptSet, Subject
from obliteratus.excise.live.hooks import applied
from obliteratus.inference.cached_prompts import CachedPrompts
from obliteratus.inference.chat_template import Ids, render_prompts
from obliteratus.inference.logits import bounded_kl
from obliteratus.inference.memory import free_memory
from obliteratus.judge.judge import SHOWN, Judge
from obliteratus.search.limits import measure_excess
from obliteratus.verify import Measurement, measure, scorers
from obliteratus.verify.behavior import COUNTED, GROUPS, pair_answers, shows_already
from obliteratus.verify.drift import drift_scores
from obliteratus.verify.openings import MIN_RATIO, MIN_SHARE, openings_to_text

ESTIMATED_SCORERS = ("behavior", "first_token_kl")  # scorers that the estimate replaces
Scores = Mapping[str, float]
Continue = Callable[[Scores, Scores], bool]
"""(estimated scores, lower bounds of rates from the answers so far) → whether to go on generating answers."""
# Memory for cached hidden states of the prompts, as a share of the weights' bytes: a search should stay within 1.2
# times the loaded model, including the answers' KV cache. Under a memory limit, at most a quarter of what is free.
CACHE_SHARE, FREE_MEMORY_SHARE = 0.1, 0.25
# Trials that are answered whatever their estimate says. They show how far the estimate is off on this model: where
# answers without the behavior begin with the same token as those with it, it is off by most of the rate.
CALIBRATING = 5


@dataclass(frozen=True)
class TrialVerdict:
    """The scores of a trial."""

    scores: Mapping[str, float]
    answered: bool
    """Whether the rates of target and keep prompts come from answers. If not, they are estimates."""
    overestimate: float | None = None
    """By how much the estimate makes the rates look worse than those of the answers are, at most: higher on target
    prompts, lower on keep prompts. None without answers."""


@dataclass(frozen=True)
class RateScale:
    """Predicts the behavior's rate from the probability of its openings, by a line through the base model's groups."""

    tokens: tuple[int, ...]
    """First tokens of answers that show it."""
    slope: float
    control_probability: float
    control_rate: float

    def estimate_rate(self, logp: Float[Tensor, "rows vocabulary"]) -> float:
        """Return the estimated share of answers that show the behavior, 0–1."""
        probability = float(opening_probability(logp, self.tokens).mean())
        return min(1.0, max(0.0, self.control_rate + self.slope * (probability - self.control_probability)))


def opening_probability(logp: Float[Tensor, "rows vocabulary"], tokens: Sequence[int]) -> Float[Tensor, " rows"]:
    """Return, for each row, the probability that the answer begins with one of the tokens."""
    return logp[:, list(tokens)].double().exp().sum(-1)


class TrialScorer:
    """Scores plans on the search prompts, against the unedited model's first tokens and rates."""

    def __init__(
        self, subject: Subject, prompts: PromptSet, recipe: Recipe, before: Measurement, judge: Judge | None = None
    ) -> None:
        """before: what the recipe's ``verify`` steps measured on the unedited model with these prompts. judge: says
        which answers show the behavior; None looks for refusals."""
        assert recipe.search is not None
        self.subject, self.prompts, self.search = subject, prompts, recipe.search
        self.judge = (judge or Judge()).without_witnesses()
        self.minimize = [self.judge.name_score(name) for name in recipe.search.minimize]
        self.groups = [g for g in GROUPS if g in prompts.groups]
        self.before = before
        self.other_scorers = [step for step in recipe.verify if step.use not in ESTIMATED_SCORERS]
        self.answer_steps = [step for step in recipe.verify if step.use == "behavior"]
        self.needed_scorers: list[Step] | None = None
        self.rows = {g: render_prompts(subject, prompts[g], reserve=recipe.search.tokens) for g in self.groups}
        self.answered_groups = [g for g in self.groups if g != "control"]
        weights = sum(p.numel() * p.element_size() for p in subject.model.parameters())
        budget = min(CACHE_SHARE * weights, FREE_MEMORY_SHARE * free_memory(subject))
        # Control prompts get no answers, so their keys and values are not cached.
        self.control = CachedPrompts(subject, self.rows["control"], budget=budget / 3, answers=())
        answered_rows = [row for g in self.answered_groups for row in self.rows[g]]
        self.answered = CachedPrompts(subject, answered_rows, budget=budget)
        base = self._split_by_group(self.answered.first_token()) | {"control": self.control.first_token()}
        self.base = base["control"]
        self.scale = fit_scale(base, before, self.judge)
        self.own_scales = {g: fit_own_scale(base, before, self.judge, g) for g in self.answered_groups if g != "target"}

    def score(
        self, plan: Plan, front: Sequence[Sequence[float]], overestimates: Sequence[float] | None = None
    ) -> TrialVerdict:
        """Score a plan; generate answers only while it could still enter the front.

        front: the objectives of the answered trials that may be chosen. overestimates: those of all answered trials, of
        which the first five are answered in any case; None for an estimate that is trusted within the search's margin.
        """
        if overestimates is not None and len(overestimates) < CALIBRATING:
            return self.score_answers(plan)
        margin = max([self.search.margin, *(overestimates or ())])
        return self._score(plan, lambda estimate, bounds: self.may_enter(estimate, bounds, front, margin))

    def estimate(self, plan: Plan) -> TrialVerdict:
        """Score a plan without answers."""
        return self._score(plan, lambda estimate, bounds: False)

    def score_answers(self, plan: Plan) -> TrialVerdict:
        """Score a plan by answers to all target and keep prompts. The rate of controls stays an estimate."""
        return self._score(plan, lambda estimate, bounds: True)

    def _score(self, plan: Plan, go_on: Continue) -> TrialVerdict:
        """Estimate, then generate answers while ``go_on`` says so; they continue from the estimate's pass.

        If generation is given up, the rates seen so far are lower bounds: no returned rate is below them.
        """
        bounds, estimated = dict[str, float](), dict[str, float]()
        with applied(self.subject, plan):
            scores = self._estimate_controls()

            def begin(logp: Tensor) -> bool:
                groups = self._split_by_group(logp).items()
                rates = {self.judge.rate_of(g): self._estimate_rate(p, g) for g, p in groups}
                scores.update(rates)
                estimated.update(rates)
                return go_on(scores, bounds)

            def proceed(shown: Collection[int]) -> bool:
                bounds.update(self._shown_shares(shown))
                return go_on(scores, bounds)

            answers = self.answered.generate(
                self.search.tokens,
                done=shows_already(self.subject, self.judge),
                accept_first=begin,
                keep_going=proceed,
            )
        if answers:
            counted = scores | self._count_verdicts(answers)
            return TrialVerdict(counted, True, self._overestimate(estimated, counted))
        return TrialVerdict(scores | {name: max(scores[name], bound) for name, bound in bounds.items()}, False)

    def _estimate_controls(self) -> dict[str, float]:
        """Return KL and the estimated rate of control prompts, and other scores that an objective needs."""
        control = self.control.first_token()
        divergence = bounded_kl(self.base, control).double()
        scores = {name: score.value for name, score in drift_scores("kl.first_token", divergence).items()}
        scores[self.judge.rate_of("control")] = self._estimate_rate(control)
        return scores | self._run_other_scorers(scores)

    def _estimate_rate(self, logp: Float[Tensor, "rows vocabulary"], group: str = "target") -> float:
        scale = self.own_scales.get(group) or self.scale
        return scale.estimate_rate(logp.nan_to_num(nan=0.0))

    def _overestimate(self, estimated: Scores, counted: Scores) -> float:
        """Return `TrialVerdict.overestimate`."""
        errors = {name: rate - counted[name] for name, rate in estimated.items()}
        keep = self.judge.rate_of("keep")
        return max(-error if name == keep else error for name, error in errors.items())

    def _split_by_group(self, rows: Tensor) -> dict[str, Tensor]:
        """Split rows of the answered prompts by group."""
        sizes = [len(self.rows[g]) for g in self.answered_groups]
        return dict(zip(self.answered_groups, rows.split(sizes), strict=True))

    def _count_verdicts(self, answers: Ids) -> dict[str, float]:
        """Return the share of each verdict by group, such as that of degenerate answers."""
        prompts = [prompt for group in self.answered_groups for prompt in self.prompts[group]]
        asked = pair_answers(self.subject, prompts, answers)
        verdicts = [judgment.verdict for judgment in self.judge.judge_all(asked)]
        return {
            self.judge.name_score(f"{name}.{g}"): sum(verdicts[row] in counted for row in rows) / len(rows)
            for g, rows in self._row_ranges().items()
            for name, counted in COUNTED.items()
        }

    def _shown_shares(self, shown: Collection[int]) -> dict[str, float]:
        """Return the share of each group's rows that show the behavior already."""
        return {
            self.judge.rate_of(g): sum(row in rows for row in shown) / len(rows)
            for g, rows in self._row_ranges().items()
        }

    def _row_ranges(self) -> dict[str, range]:
        """Return the rows of each group among the answered prompts."""
        ends = accumulate(len(self.rows[g]) for g in self.answered_groups)
        return {g: range(end - len(self.rows[g]), end) for g, end in zip(self.answered_groups, ends, strict=True)}

    def may_enter(
        self, estimate: Scores, bounds: Scores, front: Sequence[Sequence[float]], margin: float | None = None
    ) -> bool:
        """Whether a trial could still enter the front, given its estimate and the rates seen so far.

        bounds: lower bounds of rates by score name. margin: how far a rate may lie below its estimate; None for the
        search's own. A trial that would leave more of the behavior on target prompts
        than ``max_remaining`` allows is useless, so it gets answers only while the front is empty.
        """
        best = self.best_objectives(estimate, bounds, margin)
        by_name = dict(zip(self.minimize, best, strict=True))
        limit = self.search.max_remaining * self.before.scores[self.judge.rate_of("target")].value
        useful = not front or by_name.get(self.judge.rate_of("target"), 0.0) <= limit
        return useful and not any(dominates(other, best) for other in front)

    def best_objectives(self, estimate: Scores, bounds: Scores, margin: float | None = None) -> tuple[float, ...]:
        """Return the objectives if every rate were as good as the margin and the answers so far allow.

        margin: as in `may_enter`.
        """
        margin = self.search.margin if margin is None else margin
        rates = {name: value for name, value in estimate.items() if name.startswith(f"{self.judge.name}.")}
        low = {name: max(0.0, value - margin, bounds.get(name, 0.0)) for name, value in rates.items()}
        high = {name: min(1.0, max(value + margin, bounds.get(name, 0.0))) for name, value in rates.items()}
        return tuple(
            read_objective(name, {**estimate, **(high if name.startswith("-") else low)}) for name in self.minimize
        )

    def objectives(self, verdict: TrialVerdict) -> tuple[float, ...]:
        """Return the values of ``search.minimize``, in order. Raises UserError for a name that no scorer returns."""
        return tuple(read_objective(name, verdict.scores) for name in self.minimize)

    def sampled_objectives(self, verdict: TrialVerdict) -> tuple[float, ...]:
        """Return what the sampler is told: the objectives, with a KL below ``search.kl_target`` replaced.

        In its place stands the target times the share of the unedited model's rate that remains on target prompts.
        """
        return tuple(
            self._aim_at_target(value, verdict.scores) if name == KL_TARGETED else value
            for name, value in zip(self.minimize, self.objectives(verdict), strict=True)
        )

    def _aim_at_target(self, kl: float, scores: Scores) -> float:
        rate, target = self.judge.rate_of("target"), self.search.kl_target
        return target * scores[rate] / self.before.scores[rate].value if kl < target else kl

    def measure_excess(self, scores: Scores) -> dict[str, float]:
        """Return by how much each limit of the search is exceeded; nothing above 0 is feasible."""
        return measure_excess(scores, self.before.scores, self.search, self.judge.name)

    def _run_other_scorers(self, estimate: Scores) -> dict[str, float]:
        """Return the scores that objectives need and the estimate lacks. Each scorer costs passes of its own.

        The first trial runs one scorer after the other and keeps in mind which are needed.
        """
        estimated = {*estimate, *(self.judge.rate_of(g) for g in self.groups)}
        missing = {name.removeprefix("-") for name in self.minimize} - estimated
        steps = self.other_scorers if self.needed_scorers is None else self.needed_scorers
        scores, self.needed_scorers = dict[str, float](), []
        for step in steps if missing else ():
            found = self._run_scorer(step)
            scores |= {name: value for name, value in found.items() if name not in estimated}
            if missing & set(found):
                self.needed_scorers.append(step)
        return scores

    def _run_scorer(self, step: Step) -> dict[str, float]:
        """Return the scores of one scorer, which may need answers of its own."""
        answers = [s for s in self.answer_steps if "answers" in scorers[step.use].needs]
        measurement = measure(
            self.subject, self.prompts, [*answers, step], self.before, base=self.subject, judge=self.judge
        )
        return {name: score.value for name, score in measurement.scores.items()}

    def describe_openings(self) -> str:
        """Return the tokens that the behavior begins with, as text."""
        return openings_to_text(self.subject, self.scale.tokens)


def read_objective(name: str, scores: Scores) -> float:
    """Return the score of this name, negated if the name starts with a minus. Raises UserError if it is missing."""
    plain = name.removeprefix("-")
    if plain not in scores:
        raise UserError(f"search.minimize: '{plain}' is no score of a trial; use one of: {', '.join(sorted(scores))}")
    return -scores[plain] if name.startswith("-") else scores[plain]


def fit_own_scale(base: Mapping[str, Tensor], before: Measurement, judge: Judge, group: str) -> RateScale | None:
    """Return how first tokens predict the behavior in another group than target, whose answers may begin otherwise.

    None where no first token is typical of it; the target group's scale then has to do.
    """
    try:
        return fit_scale(base, before, judge, group)
    except UserError:
        return None


def fit_scale(base: Mapping[str, Tensor], before: Measurement, judge: Judge, group: str = "target") -> RateScale:
    """Find the first tokens that the behavior begins with in this model, and how their probability predicts its rate.

    The tokens are those that begin at least one in twenty answers of the group that show it, and are four times as
    frequent as for control prompts. base: first-token log-probabilities by group. Raises UserError if there is no such
    token, or if the rate in the group is not above that on control prompts.
    """
    shown = torch.tensor([r["verdict"] in SHOWN for r in before.records if r.get("group") == group])
    found, control = base[group].double().exp(), base["control"].double().exp().mean(0)
    frequency = found[shown].mean(0) if bool(shown.any()) else found.mean(0)
    tokens = tuple(int(t) for t in ((frequency >= MIN_SHARE) & (frequency >= MIN_RATIO * control)).nonzero()[:, 0])
    rates = {g: before.scores[judge.rate_of(g)].value for g in (group, "control")}
    if not tokens or rates[group] <= rates["control"]:
        raise UserError(
            f"search: {judge.name} is {rates[group]:.0%} on {group} and {rates['control']:.0%} on control search "
            f"prompts, and {len(tokens)} first tokens are typical of it; there is nothing to search for. "
            "Give other prompts"
        )
    probability = {g: float(opening_probability(base[g], tokens).mean()) for g in (group, "control")}
    slope = (rates[group] - rates["control"]) / max(1e-6, probability[group] - probability["control"])
    return RateScale(tokens, slope, probability["control"], rates["control"])
