"""Strengths in the proportions that end the behavior at the least KL, by one second-order step.

How much an edit does for the behavior, and how much it costs, differs between layers by orders of magnitude, and
differently in every model. To first order, strengths s make the behavior's answers less likely than others by gᵀs
nats; to second order they cost ½ sᵀFs nats of KL on control prompts, with F the Fisher information of s. Of all s with
the same gain the cheapest are proportional to F⁻¹g: a step of natural gradient descent (Amari 1998).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from obliteratus.causal.interventions import Pair, concatenate_answers
from obliteratus.causal.losses import ROWS_PER_PASS
from obliteratus.core.progress import note, progress
from obliteratus.core.settings import Tune
from obliteratus.core.shapes import Float
from obliteratus.core.types import Plan, PromptSet, Subject
from obliteratus.excise.live.hooks import applied
from obliteratus.judge.judge import Judge
from obliteratus.tune.objective import margin_shortfall
from obliteratus.tune.parameters import EditParameters
from obliteratus.tune.targets import TrainingPairs, collect_pairs
from obliteratus.tune.tuning_data import CachedPairs

# Added to the diagonal of F, as a share of its mean: F of some hundred edits is estimated from some fifty prompts.
RIDGE = 0.1
LEAST_RIDGE = 1e-9  # for edits that change nothing on control prompts
SWEEPS, TOLERANCE = 500, 1e-6  # of coordinate descent, and the change relative to the largest strength that ends it
STAYS = "the strengths stay as EXCISE set them"


@dataclass(frozen=True)
class BalanceData:
    """What gain and cost are measured on."""

    subject: Subject
    cached: CachedPairs
    pairs: TrainingPairs
    chosen: Sequence[Tensor]
    """Tokens that the unedited model would choose in place of the target answers' own, for each pass."""
    margin: float
    """Nats by which an answer's token should be likelier than those."""


def balance_plan(
    subject: Subject, plan: Plan, prompts: PromptSet, settings: Tune, seed: int, judge: Judge
) -> Plan | None:
    """Return the plan with the cheapest strengths that should end the behavior, none of them negative.

    prompts: fit prompts. Returns None, with a note, if no edit weakens the behavior. Raises UserError for edits that
    gradients do not pass, and NothingToFitError if every answer to a target prompt shows the behavior.
    """
    parameters = EditParameters(plan, subject.device, "strengths")
    parameters.scale(0.0)
    data = collect_balance_data(subject, plan, prompts, settings, judge)
    behavior, gain = measure_gain(data, parameters)
    fisher = estimate_fisher(data, parameters, seed)
    ridge = max(RIDGE * float(fisher.diagonal().mean()), LEAST_RIDGE)
    step = solve_nonnegative(fisher + ridge * torch.eye(len(fisher), dtype=fisher.dtype), gain)
    if (gained := float(gain @ step)) <= 0:
        note("TUNE", f"to first order no edit weakens {judge.name}; {STAYS}")
        return None
    with torch.no_grad():
        for p, value in zip(parameters.edits, step * behavior / gained, strict=True):
            p.strength.fill_(float(value))
    return parameters.to_plan()


def collect_balance_data(subject: Subject, plan: Plan, prompts: PromptSet, settings: Tune, judge: Judge) -> BalanceData:
    """Return control prompts with the model's own answers, and target prompts with answers without the behavior.

    Raises NothingToFitError if every answer to a target prompt shows it.
    """
    pairs = collect_pairs(subject, prompts, plan, settings, settings.prompts, judge)
    cached = CachedPairs(subject, [*pairs.target, *pairs.control])
    with torch.no_grad():
        chosen = [cached.logp(chunk).argmax(-1) for chunk in _chunks(pairs.target)]
    return BalanceData(subject, cached, pairs, chosen, settings.margin)


def measure_gain(data: BalanceData, parameters: EditParameters) -> tuple[float, Float[Tensor, " edits"]]:
    """Return how much of the behavior is left in nats a prompt, and by how much each strength lowers it.

    That is the shortfall of an answer's tokens behind those that the unedited model would choose (`margin_shortfall`).
    """
    strengths = [p.strength for p in parameters.edits]
    left, gain = 0.0, torch.zeros(len(strengths), dtype=torch.float64)
    with progress("TUNE gain", len(data.chosen)) as advance:
        for chunk, chosen in zip(_chunks(data.pairs.target), data.chosen, strict=True):
            with applied(data.subject, parameters.to_live_plan()):
                logp = data.cached.logp(chunk)
            loss = margin_shortfall(logp, concatenate_answers(chunk, logp.device), chosen, data.margin).sum()
            gain -= _differentiate(loss, strengths)
            left += float(loss.detach())
            advance(1)
    return left / len(data.pairs.target), gain / len(data.pairs.target)


def estimate_fisher(data: BalanceData, parameters: EditParameters, seed: int) -> Float[Tensor, "edits edits"]:
    """Return the Fisher information of the strengths in control answers: KL ≈ ½ sᵀFs.

    The KL is that of first tokens plus the mean over all tokens, as in `control_loss`. F = E[∇log p(t) ∇log p(t)ᵀ] over
    tokens t that the model itself draws, one pass a prompt: random signs keep the tokens of an answer apart, in
    expectation.
    """
    strengths = [p.strength for p in parameters.edits]
    generator, rows = torch.Generator().manual_seed(seed), list[Tensor]()
    with progress("TUNE cost", len(data.pairs.control)) as advance:
        for pair in data.pairs.control:
            with applied(data.subject, parameters.to_live_plan()):
                score = draw_score(data.cached.logp([pair]), generator)
            rows.append(_differentiate(score, strengths))
            advance(1)
    gradients = torch.stack(rows)
    return gradients.T @ gradients / len(gradients)


def draw_score(logp: Float[Tensor, "tokens vocabulary"], generator: torch.Generator) -> Float[Tensor, ""]:
    """Return log-probabilities of drawn tokens, with random signs; the first counts as much as all in the mean."""
    drawn = torch.multinomial(logp.detach().exp().cpu(), 1, generator=generator)
    signs = torch.randint(0, 2, (len(logp),), generator=generator) * 2.0 - 1
    weights = torch.full((len(logp),), 1 / len(logp))
    weights[0] += 1
    score: Tensor = (logp.gather(1, drawn.to(logp.device))[:, 0] * (signs * weights.sqrt()).to(logp)).sum()
    return score


def solve_nonnegative(
    matrix: Float[Tensor, "edits edits"], gradient: Float[Tensor, " edits"]
) -> Float[Tensor, " edits"]:
    """Return the s ≥ 0 that minimizes ½ sᵀMs − gᵀs, by coordinate descent. M must be positive definite."""
    s = torch.zeros_like(gradient)
    for _ in range(SWEEPS):
        before = s.clone()
        for i in range(len(s)):
            s[i] = (s[i] + (gradient[i] - matrix[i] @ s) / matrix[i, i]).clamp(min=0)
        if float((s - before).abs().max()) <= TOLERANCE * float(s.max()):
            break
    return s


def _chunks(pairs: Sequence[Pair]) -> list[Sequence[Pair]]:
    return [pairs[start : start + ROWS_PER_PASS] for start in range(0, len(pairs), ROWS_PER_PASS)]


def _differentiate(value: Float[Tensor, ""], strengths: Sequence[Tensor]) -> Float[Tensor, " edits"]:
    """Return d value / d strength in fp64; 0 for an edit that the value does not depend on."""
    found = torch.autograd.grad(value, strengths, allow_unused=True, materialize_grads=True)
    return torch.stack(found).double().cpu()
