"""Arditi et al.'s choice of one direction: by what its removal and its addition do to the first token."""

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
    HeldOut,
    Positions,
    CandidateTrial,
    at_least,
    at_most,
    choose_candidate,
    estimate_grid_cost,
    make_grid,
    note_choice,
    score_candidates,
    repeat_at_all_streams,
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
    return Cost(prompt_count("fit")) + estimate_grid_cost(options)  # first tokens of all fit prompts


@extractors.register("select", cite="arXiv:2406.11717", needs=("model",), cost=_cost)
def select(
    acts: Activations,
    so_far: Directions | None,
    lab: FitContext,
    *,
    positions: Positions = 5,
    held_out: HeldOut = 32,
    tokens: tuple[str, ...] = (),
    max_kl: float = 0.1,
    min_induce: float = 0.0,
) -> Directions:
    """One direction for all layers, chosen by what the model does without it and with it.

    Candidates: differences of means at the template tokens after the user's text (the last ``positions`` of them) ×
    streams below 0.8 L. Each is ablated at all writers: bypass is then the mean log-odds of refusing, on
    target prompts; KL that of first tokens on controls. Added at its stream, at its length: induce is the log-odds
    on controls. Dropped where KL > max_kl or induce < min_induce; of the others the lowest bypass wins, and is
    ``raw``. All in nats, on ``held_out`` prompts of each group that no mean was taken on; target prompts that the
    model does not refuse, and controls that it does (log-odds of the wrong sign), are left out, as published.

    tokens: texts whose first tokens begin refusals. Empty: tokens with at least 5 % of the first token's probability
    on target prompts, and four times what they have on controls; published code lists them by hand for each model.
    Of the prompts it needs no activations: the step reads its own. Raises UserError where no candidate passes.
    """
    begins, first = _first(lab)
    refusal = opening_tokens(lab.subject, tokens, "select") or typical_openings(*_shares(first), "select")
    note("select", f"tokens that begin a refusal: {openings_to_text(lab.subject, refusal)}")
    found = make_grid(lab.subject, _behaving(begins, first, refusal), positions, held_out, "select")
    judge = RefusalScorer.of(lab.subject, found, refusal)
    ranks = score_candidates(found, judge.bypass, "select")
    filters = (
        CandidateFilter("max_kl", judge.trial.divergence, at_most(max_kl)),
        CandidateFilter("min_induce", judge.induce, at_least(min_induce)),
    )
    best = choose_candidate(found, ranks, filters, "select")
    scores = f"bypass {best.rank:.2f}, induce {best.measured['min_induce']:.2f}, KL {best.measured['max_kl']:.3f} nats"
    note_choice("select", best, scores, found, judge.trial)
    return repeat_at_all_streams(acts, best.candidate.vector, best.rank, "nats, log-odds of refusing when ablated")


class RefusalScorer:
    """The two refusal scores of a candidate."""

    def __init__(self, trial: CandidateTrial, tokens: list[int]) -> None:
        self.trial, self.tokens = trial, tokens

    @classmethod
    def of(cls, subject: Subject, found: CandidateGrid, tokens: list[int]) -> RefusalScorer:
        """With the one baseline that all candidates share."""
        trial = CandidateTrial(subject, found.held)
        trial.known["control"] = trial.first(nullcontext(), "control")
        return cls(trial, tokens)

    def bypass(self, candidate: Candidate) -> float:
        """Mean log-odds of refusing on target prompts, the candidate ablated."""
        return float(log_odds(self.trial.first(self.trial.ablated(candidate), "target"), self.tokens).mean())

    def induce(self, candidate: Candidate) -> float:
        """Mean log-odds of refusing on control prompts, the candidate added."""
        return float(log_odds(self.trial.first(self.trial.added(candidate), "control"), self.tokens).mean())


def _first(lab: FitContext) -> tuple[dict[str, Ids], dict[str, Tensor]]:
    ids = {group: render_prompts(lab.subject, lab.prompts[group]) for group in ("target", "control")}
    return ids, {
        g: first_token_log_probs(lab.subject, rows, title=f"DISTILL first tokens, {g}") for g, rows in ids.items()
    }


def _shares(first: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    return first["target"].exp().mean(0), first["control"].exp().mean(0)


def _behaving(ids: Mapping[str, Ids], first: Mapping[str, Tensor], tokens: list[int]) -> dict[str, Ids]:
    """Target prompts that the model leans to refuse, and controls that it leans to answer."""
    odds = {group: log_odds(logp, tokens) for group, logp in first.items()}
    kept = {"target": odds["target"] > 0, "control": odds["control"] < 0}
    return {g: [rows[i] for i in torch.nonzero(kept[g])[:, 0].tolist()] for g, rows in ids.items()}
