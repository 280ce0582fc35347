"""COSMIC's choice of one direction: by where its removal and its addition leave the stream."""

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
    HeldOut,
    Positions,
    CandidateTrial,
    at_most,
    choose_candidate,
    estimate_grid_cost,
    make_grid,
    note_choice,
    score_candidates,
    repeat_at_all_streams,
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
    lab: FitContext,
    *,
    positions: Positions = 5,
    held_out: HeldOut = 32,
    share: Annotated[float, Field(gt=0, le=1)] = 0.1,
    max_kl: float = 0.1,
) -> Directions:
    """One direction for all layers, chosen by how it turns the groups' streams into each other; no tokens are named.

    Candidates as in ``select``. They are compared at the ``share`` of layers (⌊share·L⌋, at least one) whose group
    means have the lowest cosine at the last token. There the stream is averaged over prompts and these layers, as
    the authors' code does; the score is cos(target with the candidate ablated, control as it is) + cos(control
    with it added, target as it is), −2 to 2. The highest wins whose ablation moves the controls' first tokens by no
    more than max_kl nats; the score is ``raw``. All on ``held_out`` prompts of each group that no mean was taken on.
    Not done: the authors' extra rule that drops the last token's layers beyond the other tokens' median peak.
    Raises UserError where no candidate passes.
    """
    ids = {group: render_prompts(lab.subject, lab.prompts[group]) for group in ("target", "control")}
    found = make_grid(lab.subject, ids, positions, held_out, STEP)
    judge = ConceptInversionScorer.of(lab.subject, found, find_least_similar_streams(found.means, share))
    note(STEP, f"compared at streams {', '.join(map(str, judge.streams))}")
    ranks = score_candidates(found, lambda candidate: -judge.score(candidate), STEP)
    best = choose_candidate(found, ranks, (CandidateFilter("max_kl", judge.trial.divergence, at_most(max_kl)),), STEP)
    note_choice(STEP, best, f"score {-best.rank:.3f}, KL {best.measured['max_kl']:.3f} nats", found, judge.trial)
    return repeat_at_all_streams(acts, best.candidate.vector, -best.rank, "sum of two cosines")


def find_least_similar_streams(means: Mapping[str, Float[Tensor, "streams width"]], share: float) -> list[int]:
    """Streams that blocks leave, by lowest cosine between the groups' means: ⌊share·L⌋ of them, at least one."""
    target, control = (means[group][1:].double() for group in ("target", "control"))
    order = torch.cosine_similarity(target, control, dim=1).argsort(stable=True)
    return sorted(int(i) + 1 for i in order[: max(1, int(share * len(order)))])


class ConceptInversionScorer:
    """The concept-inversion score of a candidate."""

    def __init__(self, trial: CandidateTrial, streams: Sequence[int]) -> None:
        self.trial, self.streams = trial, list(streams)
        self.as_is = {group: self.place(nullcontext(), group) for group in ("target", "control")}

    @classmethod
    def of(cls, subject: Subject, found: CandidateGrid, streams: Sequence[int]) -> ConceptInversionScorer:
        """With the one baseline that all candidates share."""
        trial = CandidateTrial(subject, found.held)
        trial.known["control"] = trial.first(nullcontext(), "control")
        return cls(trial, streams)

    def place(self, inside: AbstractContextManager[None], group: str) -> Float[Tensor, " width"]:
        """The stream at the last token, averaged over prompts and the layers compared at. Layers above do not run."""
        ids = self.trial.held[group]
        total = torch.zeros(self.trial.subject.width, dtype=torch.float64)
        self.trial.passed += len(ids)
        with inside, report_to(SILENT):
            for reading in read_hidden_states(self.trial.subject, ids, last=max(self.streams)):
                total += reading.stream[:, self.streams].double().sum((0, 1))
        return total / (len(ids) * len(self.streams))

    def score(self, candidate: Candidate) -> float:
        """cos(ablated target, control) + cos(control with it added, target)."""
        ablated = self.place(self.trial.ablated(candidate), "target")
        added = self.place(self.trial.added(candidate), "control")
        pairs = ((ablated, self.as_is["control"]), (added, self.as_is["target"]))
        return sum(float(torch.cosine_similarity(one, other, dim=0)) for one, other in pairs)
