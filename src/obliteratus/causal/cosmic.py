"""COSMIC's choice of one direction: by how its ablation and addition turn the groups' streams into each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from obliteratus.causal.candidates import (
    Candidate,
    CandidateFilter,
    CandidateGrid,
    CandidateTrial,
    HeldOut,
    Positions,
    at_most,
    choose_candidate,
    estimate_grid_cost,
    make_grid,
    note_choice,
    repeat_at_all_streams,
    score_candidates,
)
from obliteratus.causal.interventions import FitContext
from obliteratus.core.progress import SILENT, note, report_to
from obliteratus.core.shapes import Float
from obliteratus.core.types import Activations, Directions, Subject
from obliteratus.distill.steps import extractors
from obliteratus.inference.chat_template import render_prompts
from obliteratus.inference.hidden_states import read_hidden_states

STEP = "cosmic"


@extractors.register(STEP, cite="arXiv:2506.00085", needs=("model",), cost=estimate_grid_cost)
def cosmic(
    acts: Activations,
    so_far: Directions | None,
    context: FitContext,
    *,
    positions: Positions = 5,
    held_out: HeldOut = 32,
    share: Annotated[float, Field(gt=0, le=1)] = 0.1,
    max_kl: float = 0.1,
) -> Directions:
    """Choose one direction for all layers by how it turns the groups' streams into each other; it needs no tokens.

    Candidates are those of ``select``. They are compared at the ``share`` of layers (⌊share·L⌋, at least one) whose
    group means have the lowest cosine at the last token. The stream is averaged over prompts and these layers, as in
    the authors' code; the score is cos(target with the candidate ablated, unedited control) + cos(control with it
    added, unedited target), −2 to 2. The highest score wins among candidates whose ablation changes the controls'
    first tokens by at most max_kl nats of KL; it is ``raw``. All is measured on ``held_out`` prompts of each group.
    Not implemented: the authors' extra rule that drops the last token's layers beyond the other tokens' median peak.
    Raises UserError if no candidate passes.
    """
    ids = {group: render_prompts(context.subject, context.prompts[group]) for group in ("target", "control")}
    grid = make_grid(context.subject, ids, positions, held_out, STEP)
    scorer = ConceptInversionScorer.for_grid(context.subject, grid, find_least_similar_streams(grid.means, share))
    note(STEP, f"candidates are compared at streams {', '.join(map(str, scorer.streams))}")
    ranks = score_candidates(grid, lambda candidate: -scorer.score(candidate), STEP)
    best = choose_candidate(grid, ranks, (CandidateFilter("max_kl", scorer.trial.ablation_kl, at_most(max_kl)),), STEP)
    note_choice(STEP, best, f"score {-best.rank:.3f}, KL {best.measured['max_kl']:.3f} nats", grid, scorer.trial)
    return repeat_at_all_streams(acts, best.candidate.vector, -best.rank, "sum of two cosines", best.candidate.stream)


def find_least_similar_streams(means: Mapping[str, Float[Tensor, "streams width"]], share: float) -> list[int]:
    """Return the ⌊share·L⌋ block outputs, at least one, at which the groups' means have the lowest cosine."""
    target, control = (means[group][1:].double() for group in ("target", "control"))
    order = torch.cosine_similarity(target, control, dim=1).argsort(stable=True)
    return sorted(int(i) + 1 for i in order[: max(1, int(share * len(order)))])


class ConceptInversionScorer:
    """Computes the concept-inversion score of candidates."""

    def __init__(self, trial: CandidateTrial, streams: Sequence[int]) -> None:
        self.trial, self.streams = trial, list(streams)
        self.unedited = {group: self.mean_stream(nullcontext(), group) for group in ("target", "control")}

    @classmethod
    def for_grid(cls, subject: Subject, grid: CandidateGrid, streams: Sequence[int]) -> ConceptInversionScorer:
        """Measure the baseline that all candidates share."""
        trial = CandidateTrial(subject, grid.held_out)
        trial.baseline["control"] = trial.read_first_tokens(nullcontext(), "control")
        return cls(trial, streams)

    def mean_stream(self, inside: AbstractContextManager[None], group: str) -> Float[Tensor, " width"]:
        """Return the stream at the last token inside a context, averaged over prompts and the compared streams.

        Blocks above the highest of them do not run.
        """
        ids = self.trial.held_out[group]
        total = torch.zeros(self.trial.subject.width, dtype=torch.float64)
        self.trial.n_prompts_run += len(ids)
        with inside, report_to(SILENT):
            for reading in read_hidden_states(self.trial.subject, ids, last=max(self.streams)):
                total += reading.stream[:, self.streams].double().sum((0, 1))
        return total / (len(ids) * len(self.streams))

    def score(self, candidate: Candidate) -> float:
        """Return cos(target ablated, control) + cos(control with the candidate added, target), −2 to 2."""
        ablated = self.mean_stream(self.trial.ablate(candidate), "target")
        added = self.mean_stream(self.trial.add(candidate), "control")
        pairs = ((ablated, self.unedited["control"]), (added, self.unedited["target"]))
        return sum(float(torch.cosine_similarity(one, other, dim=0)) for one, other in pairs)
