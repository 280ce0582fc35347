"""Wang et al.'s false refusal vector: it ends refusals of the target group and shares nothing with those to keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor

from obliteratus.causal.candidates import (
    Candidate,
    CandidateFilter,
    CandidateGrid,
    HeldOut,
    Positions,
    at_most,
    choose_candidate,
    compute_stream_means,
    estimate_grid_cost,
    make_grid,
    note_choice,
    repeat_at_all_streams,
    score_candidates,
)
from obliteratus.causal.interventions import FitContext
from obliteratus.causal.select import RefusalScorer, find_refusal_tokens, read_first_tokens, select_behaving
from obliteratus.core.cost import Cost, prompt_count
from obliteratus.core.errors import UserError
from obliteratus.core.shapes import Float
from obliteratus.core.types import Activations, Directions
from obliteratus.distill.steps import extractors
from obliteratus.inference.chat_template import Ids
from obliteratus.verify.openings import log_odds


def _cost(options: Mapping[str, Any]) -> Cost:
    return Cost(prompt_count("fit")) + estimate_grid_cost(options)  # first tokens of all; the grid's part has the means


@extractors.register("false_refusal", cite="arXiv:2410.03415", needs=("model", "keep"), cost=_cost)
def find_false_refusal(
    acts: Activations,
    so_far: Directions | None,
    context: FitContext,
    *,
    positions: Positions = 5,
    held_out: HeldOut = 32,
    max_kl: float = 0.2,
    share: Annotated[float, Field(ge=0, le=1)] = 1.0,
    control: bool = False,
) -> Directions:
    """Choose one direction for all layers that ends refusals of target prompts and is apart from those to keep.

    Candidates are those of `select`, w = μ_target − μ_control, less their component along r = μ_keep − μ_control at the
    same position and stream: w − λ r rᵀw / rᵀr. Of those whose ablation at all writers moves first tokens of control
    prompts by KL ≤ max_kl, the one with the lowest log-odds of refusing on target prompts wins, and is ``raw``; all in
    nats, on ``held_out`` prompts of each group. Target and keep prompts that the model does not refuse, and controls
    that it does, are left out, as published. Tokens that begin refusals are found as in `select`, for keep prompts
    apart.

    share: λ, 0–1. 1 removes all of the component, and the more remains the more of the refusals to keep end with the
    others. max_kl: 0.2 as in the authors' configuration. control: remove the control mean at that place from both w and
    r first, which the paper does not. Raises UserError if no candidate passes.
    """
    ids, log_probs = read_first_tokens(context, ("target", "control", "keep"))
    refusal = find_refusal_tokens(context, log_probs, (), "false_refusal")
    behaving = select_behaving({g: ids[g] for g in ("target", "control")}, log_probs, refusal)
    grid = make_grid(context.subject, behaving, positions, held_out, "false_refusal")
    kept = _select_refused(context, ids["keep"], log_probs)
    keep = compute_stream_means(context.subject, kept, range(-len(grid.control), 0))
    grid = orthogonalize_candidates(grid, keep, share, control)
    scorer = RefusalScorer.for_grid(context.subject, grid, refusal)
    ranks = score_candidates(grid, scorer.bypass, "false_refusal")
    filters = (CandidateFilter("max_kl", scorer.trial.ablation_kl, at_most(max_kl)),)
    best = choose_candidate(grid, ranks, filters, "false_refusal")
    scores = f"bypass {best.rank:.2f}, KL {best.measured['max_kl']:.3f} nats"
    note_choice("false_refusal", best, scores, grid, scorer.trial)
    return repeat_at_all_streams(
        acts, best.candidate.vector, best.rank, "nats, log-odds of refusing when ablated", best.candidate.stream
    )


def _select_refused(context: FitContext, ids: Ids, log_probs: Mapping[str, Tensor]) -> Ids:
    """Return the keep prompts that the model tends to refuse, by the first tokens of those refusals, which may be
    others than those of the target group's. Raises UserError if there are none."""
    keep = {"target": log_probs["keep"], "control": log_probs["control"]}
    refusal = find_refusal_tokens(context, keep, (), "false_refusal")
    refused = (log_odds(log_probs["keep"], refusal) > 0).nonzero()[:, 0].tolist()
    if not refused:
        raise UserError(
            f"distill step 'false_refusal': the model refuses none of {len(ids)} keep prompts; give some that it does"
        )
    return [ids[i] for i in refused]


def orthogonalize_candidates(
    grid: CandidateGrid, keep: Float[Tensor, "positions streams width"], share: float, control: bool
) -> CandidateGrid:
    """Return the grid with a share of each candidate's component along the keep group's difference removed.

    keep: the keep group's mean stream at each position. control: whether the control mean is removed first, from both.
    """

    def orthogonalize(candidate: Candidate) -> Candidate:
        place = candidate.position, candidate.stream
        mean = grid.control[place].double()
        vector, away = candidate.vector.double().cpu(), keep[place].double() - mean
        if control:
            vector, away = _without(vector, mean), _without(away, mean)
        vector = vector - share * (vector - _without(vector, away))
        return replace(candidate, vector=vector.to(candidate.vector))

    return replace(grid, candidates=tuple(map(orthogonalize, grid.candidates)))


def _without(vector: Float[Tensor, " width"], other: Float[Tensor, " width"]) -> Float[Tensor, " width"]:
    """Return the vector less its component along the other; the whole vector if that is zero."""
    size = other @ other
    return vector if not bool(size) else vector - (vector @ other / size) * other
