"""A logistic probe, fitted in the span of its prompts: the cost does not grow with the width."""

from __future__ import annotations

import torch
from torch import Tensor

from obliteratus.analyze.samples import FoldPlan
from obliteratus.core.shapes import Bool, Float

RIDGE = 1.0  # with rows of mean square length 1 and λ = 1, 64 dimensions of noise and 160 prompts are not overfitted
STEPS = 50  # Newton's method takes about eight
DONE = 1e-10  # change of the log-odds at which it has arrived
FLAT = 1e-9  # least p (1 − p): a prompt that is sure leaves a weight whose inverse must stay finite


def cross_validated_log_odds(
    gram: Float[Tensor, "rows rows"], plan: FoldPlan, ridge: float = RIDGE
) -> Float[Tensor, " rows"]:
    """Log-odds that each row is the target's, from a probe fitted on the other folds."""
    scores = gram.new_zeros(len(gram))
    labels = torch.arange(len(gram)) < plan.n
    for fold in range(len(plan.weights)):
        kept = plan.outside(fold)
        scores[~kept] = fit_logistic(gram, labels, kept, ridge)[~kept]
    return scores


def fit_logistic(
    gram: Float[Tensor, "rows rows"], labels: Bool[Tensor, " rows"], kept: Bool[Tensor, " rows"], ridge: float = RIDGE
) -> Float[Tensor, " rows"]:
    """Log-odds of all rows, by the kept ones alone.

    Rows are taken about the kept rows' mean and in units of their root mean square length; small is then made
    Σ log(1 + exp(−y f)) + λ/2 (‖w‖² + b²), with f = w·x + b, λ = ridge and y = ±1: iterated reweighted least squares
    on f = Kα, K = XXᵀ + 1.
    """
    kernel = _centred(gram, kept)
    size = kernel.diagonal()[kept].mean()
    kernel = kernel / torch.where(size > 0, size, 1.0) + 1
    inner, y = kernel[kept][:, kept], labels[kept].to(gram)
    alpha = torch.zeros_like(y)
    for _ in range(STEPS):
        f = inner @ alpha
        p = torch.sigmoid(f)
        weight = (p * (1 - p)).clamp(min=FLAT)
        root = weight.sqrt()  # K + λ/w, scaled by √w on both sides: its condition stays near that of K
        system = root[:, None] * inner * root + ridge * torch.eye(len(y), dtype=gram.dtype)
        solved = torch.linalg.solve_ex(system, root * (f + (y - p) / weight))[0]
        alpha, before = root * solved, f
        if (inner @ alpha - before).abs().max() < DONE:
            break
    return kernel[:, kept] @ alpha


def _centred(gram: Tensor, kept: Tensor) -> Tensor:
    """Products of the rows about the kept rows' mean."""
    along = gram[:, kept].mean(1)
    return gram - along[:, None] - along[None] + gram[kept][:, kept].mean()
