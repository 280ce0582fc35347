"""Strengths in the proportions that end the behavior at the least KL, by one second-order step.

How much an edit does for the behavior, and how much it costs, differs between layers by orders of magnitude, and
differently in every model. To first order, strengths s lower the log-odds of the behavior by gᵀs; to second order they
cost ½ sᵀFs nats of KL on control prompts, with F the Fisher information of s. Of all s with the same gain the cheapest
are proportional to F⁻¹g: a step of natural gradient descent (Amari 1998).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from obliteratus.causal.interventions import Pair, concatenate_answers
from obliteratus.core.progress import note, progress
from obliteratus.core.settings import Tune
from obliteratus.core.shapes import Float
from obliteratus.core.types import Plan, PromptSet, Subject
from obliteratus.excise.live.hooks import applied
from obliteratus.inference.chat_template import render_prompts
from obliteratus.inference.generate import generate
from obliteratus.judge.judge import Judge
from obliteratus.prompts import evenly_spaced
from obliteratus.tune.objective import margin_shortfall
from obliteratus.tune.parameters import EditParameters
from obliteratus.tune.targets import find_answering_pairs
from obliteratus.tune.tuning_data import CachedPairs
from obliteratus.verify.openings import frequent_openings, log_odds

# Added to the diagonal of F, as a share of its mean: F of some hundred edits is estimated from some fifty prompts.
RIDGE = 0.1
LEAST_RIDGE = 1e-9  # for edits that change nothing on control prompts
SWEEPS, TOLERANCE = 500, 1e-6  # of coordinate descent, and the change relative to the largest strength that ends it
ROWS = 8  # prompts of one pass with gradients, as in `causal.losses`
MARGIN = 1.0  # nats: log-odds of −1 are 27 %, below which greedy answers hardly begin with the behavior
STAYS = "the strengths stay as EXCISE set them"

Loss = Callable[[Tensor], Tensor]
"""Returns what is left of the behavior in a few prompts' answers, in nats, from log-probabilities of their tokens."""


@dataclass(frozen=True)
class BalanceData:
    """What gain and cost are measured on."""

    subject: Subject
    cached: CachedPairs
    target: Sequence[Pair]
    control: Sequence[Pair]
    """Control and keep prompts with the unedited model's own answers."""
    losses: Sequence[Loss]
    """One for each `ROWS` of the target pairs."""


def balance_plan(
    subject: Subject, plan: Plan, prompts: PromptSet, settings: Tune, seed: int, judge: Judge
) -> Plan | None:
    """Return the plan with the cheapest strengths that should end the behavior, none of them negative.

    prompts: fit prompts. Returns None, with a note, if no edit weakens the behavior. Raises UserError for edits that
    gradients do not pass, and NothingToFitError if neither first tokens nor any answer tells the behavior.
    """
    parameters = EditParameters(plan, subject.device, "strengths")
    with torch.no_grad():
        for p in parameters.edits:
            p.strength.zero_()
    data = collect_balance_data(subject, plan, prompts, settings, judge)
    behavior, gain = measure_gain(data, parameters)
    fisher = estimate_fisher(data, parameters, seed)
    ridge = max(RIDGE * float(fisher.diagonal().mean()), LEAST_RIDGE)
    step = solve_nonnegative(fisher + ridge * torch.eye(len(fisher), dtype=fisher.dtype), gain)
    if (gained := float(gain @ step)) <= 0:
        note("TUNE", f"to first order no edit weakens {judge.name}; {STAYS}")
        return None
    with torch.no_grad():
        for p, value in zip(parameters.edits, step * max(behavior, MARGIN) / gained, strict=True):
            p.strength.fill_(float(value))
    return parameters.to_plan()


def collect_balance_data(subject: Subject, plan: Plan, prompts: PromptSet, settings: Tune, judge: Judge) -> BalanceData:
    """Return the prompts with answers, and how the behavior is told from what follows.

    It is told by first tokens that are typical of target prompts. Without any it is told by the opening of answers
    without the behavior, as in gradient steps (`targets.find_answering_pairs`).
    """
    names = [g for g in ("target", "control", "keep") if g in prompts.groups]
    rows = {g: _render(subject, prompts, g, settings) for g in names}
    own = rows["control"] + rows.get("keep", [])
    answers = generate(subject, own, settings.tokens, title="TUNE own answers")
    control = [pair for pair in zip(own, answers, strict=True) if pair[1]]
    first = [(row, [0]) for row in rows["target"]]
    cached = CachedPairs(subject, [*first, *control])
    target_logp, control_logp = _first_logp(cached, first), _first_logp(cached, control)
    tokens = frequent_openings(target_logp.double().exp().mean(0), control_logp.double().exp().mean(0))
    if tokens:
        losses = [lambda logp: log_odds(logp, tokens).sum() + MARGIN * len(logp)] * -(-len(first) // ROWS)
        return BalanceData(subject, cached, first, control, losses)
    pairs = find_answering_pairs(subject, rows["target"], plan, settings.tokens, judge)
    cached = CachedPairs(subject, [*pairs, *control])
    return BalanceData(subject, cached, pairs, control, [_make_hinge(cached, chunk) for chunk in _chunks(pairs)])


def measure_gain(data: BalanceData, parameters: EditParameters) -> tuple[float, Float[Tensor, " edits"]]:
    """Return how much of the behavior is left in nats a prompt, and by how much each strength lowers it."""
    strengths = [p.strength for p in parameters.edits]
    left, gain = 0.0, torch.zeros(len(strengths), dtype=torch.float64)
    with progress("TUNE gain", len(data.losses)) as advance:
        for chunk, loss in zip(_chunks(data.target), data.losses, strict=True):
            with applied(data.subject, parameters.to_live_plan()):
                value = loss(data.cached.logp(chunk))
            gain -= _differentiate(value, strengths)
            left += float(value.detach())
            advance(1)
    return left / len(data.target), gain / len(data.target)


def estimate_fisher(data: BalanceData, parameters: EditParameters, seed: int) -> Float[Tensor, "edits edits"]:
    """Return the Fisher information of the strengths in control answers: KL ≈ ½ sᵀFs.

    The KL is that of first tokens plus the mean over all tokens, as in `control_loss`. F = E[∇log p(t) ∇log p(t)ᵀ] over
    tokens t that the model itself draws, one pass a prompt: random signs keep the tokens of an answer apart, in
    expectation.
    """
    strengths = [p.strength for p in parameters.edits]
    generator, rows = torch.Generator().manual_seed(seed), list[Tensor]()
    with progress("TUNE cost", len(data.control)) as advance:
        for pair in data.control:
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


def _render(subject: Subject, prompts: PromptSet, group: str, settings: Tune) -> list[list[int]]:
    few = [prompts[group][i] for i in evenly_spaced(len(prompts[group]), settings.prompts)]
    return render_prompts(subject, few, reserve=settings.tokens)


@torch.no_grad()
def _first_logp(cached: CachedPairs, pairs: Sequence[Pair]) -> Float[Tensor, "rows vocabulary"]:
    """Return the log-probabilities of first tokens in the unedited model."""
    found = list[Tensor]()
    for chunk in _chunks(pairs):
        found += [part[0] for part in cached.logp(chunk).split([len(answer) for _, answer in chunk])]
    return torch.stack(found)


def _make_hinge(cached: CachedPairs, pairs: Sequence[Pair]) -> Loss:
    """Return the summed shortfall of an opening's tokens behind those that the unedited model would choose."""
    with torch.no_grad():
        chosen = cached.logp(pairs).argmax(-1)
    return lambda logp: margin_shortfall(logp, concatenate_answers(pairs, logp.device), chosen, MARGIN).sum()


def _chunks(pairs: Sequence[Pair]) -> list[Sequence[Pair]]:
    return [pairs[start : start + ROWS] for start in range(0, len(pairs), ROWS)]


def _differentiate(value: Float[Tensor, ""], strengths: Sequence[Tensor]) -> Float[Tensor, " edits"]:
    """Return d value / d strength in fp64; 0 for an edit that the value does not depend on."""
    found = torch.autograd.grad(value, strengths, allow_unused=True, materialize_grads=True)
    return torch.stack(found).double().cpu()
