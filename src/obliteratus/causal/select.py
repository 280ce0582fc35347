"""Arditi et al.'s choice of one direction: by how its ablation and addition change the first token."""

from __future__ import annotations

from collections.abc import Mapping
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
    ids, log_probs = _read_first_tokens(context)
    refusal = opening_tokens(context.subject, tokens, "select") or typical_openings(
        *_mean_probabilities(log_probs), "select"
    )
    note("select", f"tokens that begin a refusal: {openings_to_text(context.subject, refusal)}")
    grid = make_grid(context.subject, _select_behaving(ids, log_probs, refusal), positions, held_out, "select")
    scorer = RefusalScorer.for_grid(context.subject, grid, refusal)
    ranks = score_candidates(grid, scorer.bypass, "select")
    filters = (
        CandidateFilter("max_kl", scorer.trial.ablation_kl, at_most(max_kl)),
        CandidateFilter("min_induce", scorer.induce, at_least(min_induce)),
    )
    best = choose_candidate(grid, ranks, filters, "select")
    scores = f"bypass {best.rank:.2f}, induce {best.measured['min_induce']:.2f}, KL {best.measured['max_kl']:.3f} nats"
    note_choice("select", best, scores, grid, scorer.trial)
    return repeat_at_all_streams(acts, best.candidate.vector, best.rank, "nats, log-odds of refusing when ablated")


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


def _read_first_tokens(context: FitContext) -> tuple[dict[str, Ids], dict[str, Tensor]]:
    ids = {group: render_prompts(context.subject, context.prompts[group]) for group in ("target", "control")}
    return ids, {
        g: first_token_log_probs(context.subject, rows, title=f"DISTILL first tokens, {g}") for g, rows in ids.items()
    }


def _mean_probabilities(log_probs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    return log_probs["target"].exp().mean(0), log_probs["control"].exp().mean(0)


def _select_behaving(ids: Mapping[str, Ids], log_probs: Mapping[str, Tensor], tokens: list[int]) -> dict[str, Ids]:
    """Keep the target prompts that the model tends to refuse and the controls that it tends to answer."""
    odds = {group: log_odds(values, tokens) for group, values in log_probs.items()}
    behaves = {"target": odds["target"] > 0, "control": odds["control"] < 0}
    return {g: [rows[i] for i in torch.nonzero(behaves[g])[:, 0].tolist()] for g, rows in ids.items()}
