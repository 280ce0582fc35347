"""Arditi et al.'s choice of one direction: by how its ablation and addition change the first token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from obliteratus.causal.candidates import (
    Candidate,
    CandidateFilter,
    CandidateGrid,
    CandidateTrial,
    HeldOut,
    Positions,
    at_least,
    at_most,
    choose_candidate,
    estimate_grid_cost,
    make_grid,
    note_choice,
    repeat_at_all_streams,
    score_candidates,
)
from obliteratus.causal.interventions import FitContext
from obliteratus.core.cost import Cost, prompt_count
from obliteratus.core.progress import note
from obliteratus.core.types import Activations, Directions, Subject
from obliteratus.distill.steps import extractors
from obliteratus.inference.chat_template import Ids, render_prompts
from obliteratus.inference.logits import first_token_log_probs
from obliteratus.verify.openings import log_odds, opening_tokens, openings_to_text, typical_openings


def _cost(options: Mapping[str, Any]) -> Cost:
    return Cost(prompt_count("fit")) + estimate_grid_cost(options)  # the first term: first tokens of all fit prompts


@extractors.register("select", cite="arXiv:2406.11717", needs=("model",), cost=_cost)
def select(
    acts: Activations,
    so_far: Directions | None,
    context: FitContext,
    *,
    positions: Positions = 5,
    held_out: HeldOut = 32,
    tokens: tuple[str, ...] = (),
    max_kl: float = 0.1,
    min_induce: float = 0.0,
) -> Directions:
    """Choose one direction for all layers by what the model does when it is ablated and when it is added.

    Candidates are differences of means at the last ``positions`` template tokens after the user's text × streams below
    0.8 L. With a candidate ablated at all writers, bypass is the mean log-odds of refusing on target prompts, and KL
    that of first tokens on controls. With it added to its stream, unscaled, induce is the log-odds of refusing on
    controls. Candidates with KL > max_kl or induce < min_induce are dropped; of the others the lowest bypass wins, and
    is ``raw``. All values are in nats, on ``held_out`` prompts of each group. Target prompts that the model does not
    refuse and controls that it does (log-odds of the wrong sign) are left out, as published.

    tokens: texts whose first tokens begin refusals. If empty, the tokens with at least 5 % of the first token's
    probability on target prompts and four times that on controls; the published code lists them by hand for each model.
    The step reads its own activations. Raises UserError if no candidate passes.
    """
    ids, log_probs = read_first_tokens(context, ("target", "control"))
    refusal = find_refusal_tokens(context, log_probs, tokens, "select")
    grid = make_grid(context.subject, select_behaving(ids, log_probs, refusal), positions, held_out, "select")
    scorer = RefusalScorer.for_grid(context.subject, grid, refusal)
    ranks = score_candidates(grid, scorer.bypass, "select")
    filters = (
        CandidateFilter("max_kl", scorer.trial.ablation_kl, at_most(max_kl)),
        CandidateFilter("min_induce", scorer.induce, at_least(min_induce)),
    )
    best = choose_candidate(grid, ranks, filters, "select")
    scores = f"bypass {best.rank:.2f}, induce {best.measured['min_induce']:.2f}, KL {best.measured['max_kl']:.3f} nats"
    note_choice("select", best, scores, grid, scorer.trial)
    return repeat_at_all_streams(
        acts, best.candidate.vector, best.rank, "nats, log-odds of refusing when ablated", best.candidate.stream
    )


class RefusalScorer:
    """Computes the two refusal scores of candidates."""

    def __init__(self, trial: CandidateTrial, tokens: list[int]) -> None:
        self.trial, self.tokens = trial, tokens

    @classmethod
    def for_grid(cls, subject: Subject, grid: CandidateGrid, tokens: list[int]) -> RefusalScorer:
        """Measure the baseline that all candidates share."""
        trial = CandidateTrial(subject, grid.held_out)
        trial.baseline["control"] = trial.read_first_tokens(nullcontext(), "control")
        return cls(trial, tokens)

    def bypass(self, candidate: Candidate) -> float:
        """Return the mean log-odds of refusing on target prompts with the candidate ablated."""
        return float(log_odds(self.trial.read_first_tokens(self.trial.ablate(candidate), "target"), self.tokens).mean())

    def induce(self, candidate: Candidate) -> float:
        """Return the mean log-odds of refusing on control prompts with the candidate added."""
        return float(log_odds(self.trial.read_first_tokens(self.trial.add(candidate), "control"), self.tokens).mean())


def read_first_tokens(context: FitContext, groups: Sequence[str]) -> tuple[dict[str, Ids], dict[str, Tensor]]:
    """Return the groups' templated prompts, and the log-probabilities of their answers' first tokens."""
    ids = {group: render_prompts(context.subject, context.prompts[group]) for group in groups}
    return ids, {
        g: first_token_log_probs(context.subject, rows, title=f"DISTILL first tokens, {g}") for g, rows in ids.items()
    }


def find_refusal_tokens(
    context: FitContext, log_probs: Mapping[str, Tensor], tokens: Sequence[str], step: str
) -> list[int]:
    """Return the ids of the first tokens that begin refusals: those given, else those typical of target prompts."""
    target, control = (log_probs[g].exp().mean(0) for g in ("target", "control"))
    refusal = opening_tokens(context.subject, tokens, step) or typical_openings(target, control, step)
    note(step, f"tokens that begin a refusal: {openings_to_text(context.subject, refusal)}")
    return refusal


def select_behaving(ids: Mapping[str, Ids], log_probs: Mapping[str, Tensor], tokens: list[int]) -> dict[str, Ids]:
    """Keep the controls that the model tends to answer, and the prompts of other groups that it tends to refuse."""
    odds = {group: log_odds(log_probs[group], tokens) for group in ids}
    behaves = {group: values < 0 if group == "control" else values > 0 for group, values in odds.items()}
    return {g: [rows[i] for i in torch.nonzero(behaves[g])[:, 0].tolist()] for g, rows in ids.items()}
