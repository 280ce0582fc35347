"""Refusal direction optimization (RDO): a direction fitted by gradients through the model, with the published loss."""

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
from obliteratus.core.cost import Answers, Cost, Training, constant, prompt_count
from obliteratus.core.errors import UserError
from obliteratus.core.progress import note, progress
from obliteratus.core.shapes import Float
from obliteratus.core.types import Activations, Directions, Subject
from obliteratus.distill.steps import compute_score, extractors, mean_difference, require_directions
from obliteratus.inference.chat_template import encode_texts, render_prompts
from obliteratus.inference.generate import generate

BETAS = (0.9, 0.98)  # the authors' code; with amsgrad, no weight decay
MIN_IMPROVEMENT = 1e-4  # a held-out loss that fell by less than this has not improved
CHECK_EVERY = 5  # steps between two evaluations: each costs as much as a step, and four fit into the patience
MAX_GRADIENT = 10.0  # longest gradient of a step, as in the authors' code
SENTENCE_END = "."  # of a refusal only what stands before the first one is a target, as in the authors' code
HELD_OUT_PROMPTS = 16  # of each loss: batches of 8 differ by 0.07, and a step's progress is far less
MIN_HELD_OUT = 4  # fewer held-out prompts than this tell nothing
RATE_DIVISOR = 10.0  # divides the rate when the loss stalls, at most twice (both as in the authors' code)


@dataclass(frozen=True)
class RdoSettings:
    """Options of the fit."""

    steps: int
    lr: float
    batch: int
    patience: int


@extractors.register("rdo", cite="arXiv:2502.17420", needs=("model",), cost=lambda options: _cost(**options))
def rdo(
    acts: Activations,
    so_far: Directions | None,
    context: FitContext,
    *,
    steps: Annotated[int, Field(ge=1, le=2000)] = 64,  # the authors' epoch: 1024 prompts in batches of 16
    lr: Annotated[float, Field(gt=0, le=1)] = 0.01,
    batch: Annotated[int, Field(ge=1, le=64)] = 16,
    tokens: Annotated[int, Field(ge=2, le=128)] = 30,
    patience: Annotated[int, Field(ge=1)] = 20,
) -> Directions:
    """Fit one direction for the whole model by gradients through it.

    Ablating it should end refusals without changing the distribution of answers to control prompts, and adding it
    should cause refusals. The loss, as published, is the mean over prompts of the cross-entropy of answers, in nats a
    token, + 0.2 × that of refusals, up to their first full stop, + KL(ablated ‖ unedited) summed over an answer's
    tokens. The fit starts from the direction that `select` chose, and adds it at its stream and with its length there,
    as published; after another step (svd, mean_diff) from that step's best row. It takes at most ``steps`` gradient
    steps. batch: prompts of each loss a step. tokens: of each answer. raw: the loss reached, in nats (lower is better,
    unlike elsewhere).

    Three things differ from the authors' code. The loss that decides is that of 16 held-out prompts of each kind, every
    5 steps, where theirs is that of the batch: if it fell by less than 1e-4 the rate is divided by ten, at most twice,
    and after ``patience`` steps without improvement the fit stops and keeps the direction of least held-out loss.
    Prompts that the model does not refuse, or controls that it does, are not left out. Behind a norm, the direction is
    ablated as it reaches the stream. Raises UserError if there is no direction to start from.
    """
    previous = require_directions(so_far, "rdo")
    stream = max(1, int(previous.score.argmax())) if previous.origin is None else previous.origin[0]
    start = previous.basis[stream, 0]
    if not bool(start.any()):
        raise UserError(
            "distill step 'rdo': the step before found no direction to start from; check that the two groups differ"
        )
    size = float(mean_difference(acts)[stream].norm()) if previous.origin is None else previous.origin[1]
    inputs = _collect_inputs(context, start, stream, size, tokens)
    fitted = fit_direction(
        DirectionLosses(context.subject, stream, size), inputs, start, RdoSettings(steps, lr, batch, patience)
    )
    note(
        "rdo",
        f"{fitted.steps} of {steps} steps, held-out loss {fitted.start_loss:.3f} → {fitted.loss:.3f}, "
        f"cosine to the start {float(fitted.best @ start):.3f}",
    )
    basis = fitted.best.expand(len(previous.score), 1, -1).contiguous()
    return Directions(basis, compute_score(acts, basis), torch.full_like(previous.raw, fitted.loss), "nats")


def _cost(steps: int, batch: int, tokens: int, **others: int | float) -> Cost:
    """Return the cost: answers for the three losses, three batches with gradients a step, and the evaluations.

    The model's own answers run once more, without gradients.
    """
    answers = (Answers(tokens, prompt_count("fit", "target")), Answers(tokens, prompt_count("fit", "control"), 2))
    evaluations = constant(3 * HELD_OUT_PROMPTS * (1 + -(-steps // CHECK_EVERY)))
    return Cost(evaluations + prompt_count("fit", "control"), answers, training=(Training(steps, 3 * batch, tokens),))


def _collect_inputs(context: FitContext, start: Tensor, stream: int, size: float, tokens: int) -> LossInputs:
    target, control = (
        render_prompts(context.subject, context.prompts[g], reserve=tokens) for g in ("target", "control")
    )

    def answer(ids: list[list[int]], inside: AbstractContextManager[None], title: str) -> list[Pair]:
        with inside:
            answers = generate(context.subject, ids, tokens, title=title)
        return [(p, a) for p, a in zip(ids, answers, strict=True) if a]

    start = start.to(context.subject.device)
    return LossInputs(
        answer(target, ablate(context.subject, start), "rdo answers"),
        cut_sentences(
            context.subject, answer(control, add_to_stream(context.subject, stream, size * start), "rdo refusals")
        ),
        answer(control, nullcontext(), "rdo own answers"),
    )


def cut_sentences(subject: Subject, pairs: Sequence[Pair]) -> list[Pair]:
    """Return the pairs with each answer up to its first full stop, without it; those with nothing before it are left
    out. If that leaves none, the pairs stay as they are."""
    texts = subject.tokenizer.batch_decode([answer for _, answer in pairs], skip_special_tokens=True)
    cut = encode_texts(subject, [text.partition(SENTENCE_END)[0] for text in texts])
    first = [(prompt, ids) for (prompt, _), ids in zip(pairs, cut, strict=True) if ids]
    return first or list(pairs)


# ------------------------------------------------------------------------------------------------- fit
def fit_direction(
    losses: DirectionLosses, inputs: LossInputs, start: Float[Tensor, " width"], settings: RdoSettings
) -> EarlyStopping[Tensor]:
    """Return the unit direction of least held-out loss, as the best of an `EarlyStopping`."""
    held_out, fit = _split_held_out(inputs)
    d = start.to(losses.subject.device).clone().requires_grad_(True)
    optimizer = torch.optim.AdamW([d], lr=settings.lr, betas=BETAS, weight_decay=0.0, amsgrad=True)
    stopping = EarlyStopping(d.detach().clone(), _total_loss(losses, d, held_out), MIN_IMPROVEMENT, CHECK_EVERY)
    with progress("DISTILL rdo", settings.steps) as advance:
        for stopping.steps in range(1, settings.steps + 1):
            _step(losses, d, optimizer, _draw_inputs(fit, settings.batch, stopping.steps))
            advance(1)
            if stopping.should_check(settings.steps) and not stopping.update(
                d.detach().clone(), _total_loss(losses, d, held_out)
            ):
                _reduce_rate(optimizer, settings.lr)
            if stopping.stalled_steps >= settings.patience:
                break
    stopping.best = stopping.best.cpu()
    return stopping


def _step(losses: DirectionLosses, d: Tensor, optimizer: torch.optim.Optimizer, inputs: LossInputs) -> None:
    """Take one gradient step on the unit sphere."""
    optimizer.zero_grad()
    for part in losses.parts(d, inputs):
        part.backward()
    with torch.no_grad():
        assert d.grad is not None
        d.grad -= (d.grad @ d) * d  # the component that only changes the length
        torch.nn.utils.clip_grad_norm_([d], MAX_GRADIENT)
        optimizer.step()
        d /= d.norm()


def _reduce_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = max(group["lr"] / RATE_DIVISOR, lr / RATE_DIVISOR**2)


@torch.no_grad()
def _total_loss(losses: DirectionLosses, d: Tensor, inputs: LossInputs) -> float:
    return float(losses.total(d, inputs))


def _split_held_out(inputs: LossInputs) -> tuple[LossInputs, LossInputs]:
    """Split into (held out, fitted on). At most a quarter is held out; if that is too few, all pairs are in both."""

    def split(pairs: Sequence[Pair]) -> tuple[Sequence[Pair], Sequence[Pair]]:
        mixed = draw_batch(pairs, len(pairs), random.Random(0))
        n = min(HELD_OUT_PROMPTS, len(pairs) // 4)
        return (mixed[:n], mixed[n:]) if n >= MIN_HELD_OUT else (mixed, mixed)

    both = [split(pairs) for pairs in (inputs.answers, inputs.refusals, inputs.own_answers)]
    return LossInputs(*(held_out for held_out, _ in both)), LossInputs(*(fitted for _, fitted in both))


def _draw_inputs(inputs: LossInputs, size: int, step: int) -> LossInputs:
    rng = random.Random(step)  # the same batches in every run
    return LossInputs(
        *(draw_batch(pairs, size, rng) for pairs in (inputs.answers, inputs.refusals, inputs.own_answers))
    )
