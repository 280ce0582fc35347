"""Refusal direction optimisation: a direction fitted by gradients through the model, as published."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from obliteratus.causal.early_stopping import EarlyStopping, draw_batch
from obliteratus.causal.interventions import FitContext, Pair, ablate, add_to_stream
from obliteratus.causal.losses import DirectionLosses, LossInputs
from obliteratus.core.cost import Answers, Cost, Training, prompt_count, number
from obliteratus.core.errors import UserError
from obliteratus.core.progress import note, progress
from obliteratus.core.shapes import Float
from obliteratus.core.types import Activations, Directions
from obliteratus.distill.steps import extractors, mean_difference, require_directions, compute_score
from obliteratus.inference.chat_template import render_prompts
from obliteratus.inference.generate import generate

BETAS = (0.9, 0.98)  # the authors' code; with amsgrad, no weight decay
MIN_IMPROVEMENT = 1e-4  # a loss on the held answers that fell by less than this stands still
CHECK_EVERY = 5  # steps between two looks at it: each look costs as much as a step, and four fit into the patience
HELD_OUT_PROMPTS = 16  # prompts of each loss that no step sees: batches of 8 differ by 0.07, a step's progress is far less
MIN_HELD_OUT = 4  # fewer held prompts than this say nothing
RATE_DIVISOR = 10.0  # where it stands still, the rate falls by this, at most to a hundredth (both: the authors' code)


@dataclass(frozen=True)
class RdoSettings:
    """How to fit."""

    steps: int
    lr: float
    batch: int
    patience: int


@extractors.register("rdo", cite="arXiv:2502.17420", needs=("model",), cost=lambda options: _cost(**options))
def rdo(
    acts: Activations,
    so_far: Directions | None,
    lab: FitContext,
    *,
    steps: Annotated[int, Field(ge=1, le=2000)] = 200,
    lr: Annotated[float, Field(gt=0, le=1)] = 0.01,
    batch: Annotated[int, Field(ge=1, le=64)] = 8,
    tokens: Annotated[int, Field(ge=2, le=128)] = 16,
    patience: Annotated[int, Field(ge=1)] = 20,
) -> Directions:
    """One direction for the whole model, fitted by gradients through it.

    Refusals go when it is ablated, come when it is added, and control prompts keep their answers' distribution when
    it is ablated: cross-entropy of answers + 0.2 × that of refusals + KL, in nats a token.
    Starts from the best row of the step before (svd, mean_diff). steps: cap on gradient steps. Every five, the loss is
    taken on 16 prompts of each kind that no step sees: where it fell by less than 1e-4 the rate is divided by ten, and
    after ``patience`` steps of that it stops; the direction with the least such loss is kept. batch: prompts of each
    loss. tokens: of each answer. raw: the loss reached, in nats (lower is better, unlike elsewhere).
    """
    found = require_directions(so_far, "rdo")
    stream = max(1, int(found.score.argmax()))
    start = found.basis[stream, 0]
    if not bool(start.any()):
        raise UserError("distill step 'rdo': the step before found no direction to start from")
    size = float(mean_difference(acts)[stream].norm())
    material = _collect_inputs(lab, start, stream, size, tokens)
    fitted = fit_direction(
        DirectionLosses(lab.subject, stream, size), material, start, RdoSettings(steps, lr, batch, patience)
    )
    note(
        "rdo",
        f"{fitted.used} of {steps} steps, held-out loss {fitted.first:.3f} → {fitted.loss:.3f}, "
        f"cosine to the start {float(fitted.best @ start):.3f}",
    )
    basis = fitted.best.expand(len(found.score), 1, -1).contiguous()
    return Directions(basis, compute_score(acts, basis), torch.full_like(found.raw, fitted.loss), "nats")


def _cost(steps: int, batch: int, tokens: int, **others: int | float) -> Cost:
    """Answers for the three losses; three batches with gradients a step; a look at what is held out every few steps.

    The model's own answers pass once more than that, without gradients.
    """
    written = (Answers(tokens, prompt_count("fit", "target")), Answers(tokens, prompt_count("fit", "control"), 2))
    looks = number(3 * HELD_OUT_PROMPTS * (1 + -(-steps // CHECK_EVERY)))
    return Cost(looks + prompt_count("fit", "control"), written, training=(Training(steps, 3 * batch, tokens),))


def _collect_inputs(lab: FitContext, start: Tensor, stream: int, size: float, tokens: int) -> LossInputs:
    target, control = (render_prompts(lab.subject, lab.prompts[g], reserve=tokens) for g in ("target", "control"))

    def written(ids: list[list[int]], inside: AbstractContextManager[None], title: str) -> list[Pair]:
        with inside:
            answers = generate(lab.subject, ids, tokens, title=title)
        return [(p, a) for p, a in zip(ids, answers, strict=True) if a]

    start = start.to(lab.subject.device)
    return LossInputs(
        written(target, ablate(lab.subject, start), "rdo answers"),
        written(control, add_to_stream(lab.subject, stream, size * start), "rdo refusals"),
        written(control, nullcontext(), "rdo own answers"),
    )


# ------------------------------------------------------------------------------------------------- fit
def fit_direction(
    losses: DirectionLosses, material: LossInputs, start: Float[Tensor, " width"], how: RdoSettings
) -> EarlyStopping[Tensor]:
    """The unit direction with the least loss on what no step sees."""
    held, seen = _split_held_out(material)
    d = start.to(losses.subject.device).clone().requires_grad_(True)
    optimiser = torch.optim.AdamW([d], lr=how.lr, betas=BETAS, weight_decay=0.0, amsgrad=True)
    found = EarlyStopping(d.detach().clone(), _total_loss(losses, d, held), MIN_IMPROVEMENT, CHECK_EVERY)
    with progress("DISTILL rdo", how.steps) as advance:
        for found.used in range(1, how.steps + 1):
            _step(losses, d, optimiser, _draw_inputs(seen, how.batch, found.used))
            advance(1)
            if found.looks(how.steps) and not found.judge(d.detach().clone(), _total_loss(losses, d, held)):
                _reduce_rate(optimiser, how.lr)
            if found.still >= how.patience:
                break
    found.best = found.best.cpu()
    return found


def _step(losses: DirectionLosses, d: Tensor, optimiser: torch.optim.Optimizer, material: LossInputs) -> None:
    """One step along the unit sphere."""
    optimiser.zero_grad()
    for part in losses.parts(d, material):
        part.backward()
    with torch.no_grad():
        assert d.grad is not None
        d.grad -= (d.grad @ d) * d  # what only changes its length
        optimiser.step()
        d /= d.norm()


def _reduce_rate(optimiser: torch.optim.Optimizer, lr: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = max(group["lr"] / RATE_DIVISOR, lr / RATE_DIVISOR**2)


@torch.no_grad()
def _total_loss(losses: DirectionLosses, d: Tensor, material: LossInputs) -> float:
    return float(losses.total(d, material))


def _split_held_out(material: LossInputs) -> tuple[LossInputs, LossInputs]:
    """(held, seen): at most a quarter is held; where that is less than `MIN_HELD_OUT`, all are both."""

    def parted(pairs: Sequence[Pair]) -> tuple[Sequence[Pair], Sequence[Pair]]:
        mixed = draw_batch(pairs, len(pairs), random.Random(0))
        n = min(HELD_OUT_PROMPTS, len(pairs) // 4)
        return (mixed[:n], mixed[n:]) if n >= MIN_HELD_OUT else (mixed, mixed)

    both = [parted(pairs) for pairs in (material.answers, material.refusals, material.kept)]
    return LossInputs(*(held for held, _ in both)), LossInputs(*(seen for _, seen in both))


def _draw_inputs(material: LossInputs, size: int, step: int) -> LossInputs:
    rng = random.Random(step)  # the same batches in every run
    return LossInputs(*(draw_batch(pairs, size, rng) for pairs in (material.answers, material.refusals, material.kept)))
