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
from torch.nn import functional as F

from obliteratus.distill.steps import before, difference, extractors, scored
from obliteratus.errors import UserError
from obliteratus.progress import note, progress
from obliteratus.shapes import Float
from obliteratus.summon.generate import generate
from obliteratus.summon.render import render
from obliteratus.tune.lab import Lab, Pair, ablating, adding, answer_logits, answer_tokens
from obliteratus.types import Activations, Directions
from obliteratus.work import Answers, Cost, Training, n_of, number

ABLATION, ADDITION, RETAIN = 1.0, 0.2, 1.0  # weights of the three losses, arXiv:2502.17420
FALLING = 1e-4  # a smoothed loss that fell by less than this counts as standing still
MEMORY = 0.9  # of the smoothed loss: batches differ by far more than a step's progress


@dataclass(frozen=True)
class Material:
    """What the losses are taken on. All answers come from the model itself, under the direction it starts from."""

    answers: Sequence[Pair]
    """Target prompts with what the model says when the direction is ablated."""
    refusals: Sequence[Pair]
    """Control prompts with what it says when the direction is added."""
    kept: Sequence[Pair]
    """Control prompts with its own answers."""


@extractors.register("rdo", cite="arXiv:2502.17420", needs=("model",), cost=lambda options: _cost(**options))
def rdo(
    acts: Activations,
    so_far: Directions | None,
    lab: Lab,
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
    Starts from the best row of the step before (svd, mean_diff). steps: cap on gradient steps; it stops earlier
    once the smoothed loss has stood still for ``patience`` steps. batch: prompts of each loss. tokens: of each
    answer. raw: the smoothed loss reached, in nats (lower is better, unlike elsewhere).
    """
    found = before(so_far, "rdo")
    stream = max(1, int(found.score.argmax()))
    start = found.basis[stream, 0]
    if not bool(start.any()):
        raise UserError("distill step 'rdo': the step before found no direction to start from")
    size = float(difference(acts)[stream].norm())
    material = _material(lab, start, stream, size, tokens)
    best, loss, used = _fitted(lab, material, start, (stream, size), (steps, lr, batch, patience))
    note("rdo", f"{used} of {steps} steps, loss {loss:.3f}, cosine to the start {float(best @ start):.3f}")
    basis = best.expand(len(found.score), 1, -1).contiguous()
    return Directions(basis, scored(acts, basis), torch.full_like(found.raw, loss), "nats")


def _cost(steps: int, batch: int, tokens: int, **others: int | float) -> Cost:
    """Answers for the three losses; at each step three batches with gradients, and one without."""
    written = (Answers(tokens, n_of("fit", "target")), Answers(tokens, n_of("fit", "control"), 2))
    return Cost(number(steps * batch), written, training=(Training(steps, 3 * batch, tokens),))


def _material(lab: Lab, start: Tensor, stream: int, size: float, tokens: int) -> Material:
    target, control = (render(lab.subject, lab.prompts[g], reserve=tokens) for g in ("target", "control"))

    def written(ids: list[list[int]], inside: AbstractContextManager[None], title: str) -> list[Pair]:
        with inside:
            answers = generate(lab.subject, ids, tokens, title=title)
        return [(p, a) for p, a in zip(ids, answers, strict=True) if a]

    start = start.to(lab.subject.device)
    return Material(
        written(target, ablating(lab.subject, start), "rdo answers"),
        written(control, adding(lab.subject, stream, size * start), "rdo refusals"),
        written(control, nullcontext(), "rdo own answers"),
    )


def _fitted(
    lab: Lab,
    material: Material,
    start: Float[Tensor, " width"],
    place: tuple[int, float],
    settings: tuple[int, float, int, int],
) -> tuple[Float[Tensor, " width"], float, int]:
    """The unit direction with the least smoothed loss, that loss, and the steps used."""
    steps, lr, batch, patience = settings
    d = start.to(lab.subject.device).clone().requires_grad_(True)
    optimiser = torch.optim.Adam([d], lr=lr)
    smooth: float | None = None
    best, best_d, still = float("inf"), start, 0
    with progress("DISTILL rdo", steps) as advance:
        for step in range(steps):
            loss = rdo_loss(lab, d / d.norm(), place, _batch(material, batch, step))
            now = float(loss.detach())
            smooth = now if smooth is None else MEMORY * smooth + (1 - MEMORY) * now
            still = 0 if smooth < best - FALLING else still + 1
            if smooth < best:
                best, best_d = smooth, (d / d.norm()).detach().cpu()
            if still >= patience:
                break
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            advance(1)
    return best_d, best, step + 1


def rdo_loss(
    lab: Lab, unit: Float[Tensor, " width"], place: tuple[int, float], material: Material
) -> Float[Tensor, ""]:
    """Ablation + 0.2 × addition + retain, in nats a token. place: stream index and length of what is added."""
    subject, (stream, size) = lab.subject, place
    with torch.no_grad():
        base = answer_logits(subject, material.kept).log_softmax(-1)
    with ablating(subject, unit):
        answered = F.cross_entropy(
            answer_logits(subject, material.answers), answer_tokens(material.answers, subject.device)
        )
        found = answer_logits(subject, material.kept).log_softmax(-1)
        kept = F.kl_div(found, base, reduction="batchmean", log_target=True)  # nats a token
    with adding(subject, stream, size * unit):
        refused = F.cross_entropy(
            answer_logits(subject, material.refusals), answer_tokens(material.refusals, subject.device)
        )
    return ABLATION * answered + ADDITION * refused + RETAIN * kept


def _batch(material: Material, size: int, step: int) -> Material:
    rng = random.Random(step)  # the same batches in every run

    def some(pairs: Sequence[Pair]) -> list[Pair]:
        return rng.sample(list(pairs), min(size, len(pairs)))

    return Material(some(material.answers), some(material.refusals), some(material.kept))
