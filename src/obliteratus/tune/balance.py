"""Strengths in the proportions that end the behavior at the least KL, by one second-order step.

How much an edit does for the behavior, and how much it costs, differs between layers by orders of magnitude, and
differently in every model. To first order, strengths s make the behavior's answers less likely than others by gᵀs
nats; to second order they cost ½ sᵀFs nats of KL on control prompts, with F the Fisher information of s. Of all s with
the same gain the cheapest are proportional to F⁻¹g: a step of natural gradient descent (Amari 1998).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from obliteratus.core.progress import progress
from obliteratus.core.shapes import Float
from obliteratus.core.types import Plan
from obliteratus.excise.live.hooks import applied
from obliteratus.tune.gradient_memory import recompute_blocks
from obliteratus.tune.parameters import EditParameters
from obliteratus.tune.targets import TrainingPairs
from obliteratus.tune.tuning_data import TuningData

# Added to the diagonal of F, as a share of its mean: F of some hundred edits is estimated from some fifty prompts.
RIDGE = 0.1
LEAST_RIDGE = 1e-9  # for edits that change nothing on control prompts
# Times the strengths that should be enough to first order, since they are not: 2.5 times was needed on astronomy, 2.2
# times on weather-late.
BEYOND_FIRST_ORDER = 1.7
SWEEPS, TOLERANCE = 500, 1e-6  # of coordinate descent, and the change relative to the largest strength that ends it


def balance_plan(data: TuningData, plan: Plan) -> Plan | None:
    """Return the plan with the cheapest strengths that should end the behavior, none of them negative.

    Returns None if no edit weakens the behavior. Raises UserError for edits that gradients do not pass.
    """
    parameters = EditParameters(plan, data.subject.device, "strengths")
    parameters.scale(0.0)
    behavior, gain = measure_gain(data, parameters)
    fisher = estimate_fisher(data, parameters)
    ridge = max(RIDGE * float(fisher.diagonal().mean()), LEAST_RIDGE)
    step = solve_nonnegative(fisher + ridge * torch.eye(len(fisher), dtype=fisher.dtype), gain)
    if (gained := float(gain @ step)) <= 0:
        return None
    with torch.no_grad():
        for p, value in zip(parameters.edits, BEYOND_FIRST_ORDER * step * behavior / gained, strict=True):
            p.strength.fill_(float(value))
    return parameters.to_plan()


def measure_gain(data: TuningData, parameters: EditParameters) -> tuple[float, Float[Tensor, " edits"]]:
    """Return the hinge loss of target answers in nats a prompt, and by how much each strength lowers it."""
    strengths = [p.strength for p in parameters.edits]
    left, gain = 0.0, torch.zeros(len(strengths), dtype=torch.float64)
    pairs = TrainingPairs((), data.train.target)
    for part in data.iterate_losses(parameters.to_live_plan(), pairs, data.settings.margin):
        gain -= _differentiate(part.hinge, strengths)
        left += float(part.hinge.detach())
    return left, gain


def estimate_fisher(data: TuningData, parameters: EditParameters) -> Float[Tensor, "edits edits"]:
    """Return the Fisher information of the strengths in control answers: KL ≈ ½ sᵀFs.

    The KL is that of first tokens plus the mean over all tokens, as in `control_loss`. F = E[∇log p(t) ∇log p(t)ᵀ] over
    tokens t that the model itself draws, one pass a prompt: random signs keep the tokens of an answer apart, in
    expectation.
    """
    strengths = [p.strength for p in parameters.edits]
    generator, rows = torch.Generator().manual_seed(data.seed), list[Tensor]()
    with progress("TUNE balance", len(data.train.control)) as advance:
        for pair in data.train.control:
            with applied(data.subject, parameters.to_live_plan()), recompute_blocks(data.subject, data.memory):
                rows.append(_differentiate(draw_score(data.cached.logp([pair]), generator), strengths))
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


def _differentiate(value: Float[Tensor, ""], strengths: Sequence[Tensor]) -> Float[Tensor, " edits"]:
    """Return d value / d strength in fp64; 0 for an edit that the value does not depend on.

    The graph stays, since parts of a loss share the small one of the parameters.
    """
    found = torch.autograd.grad(value, strengths, retain_graph=True, allow_unused=True, materialize_grads=True)
    return torch.stack(found).double().cpu()
