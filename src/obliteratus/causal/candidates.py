"""Candidate directions at every template position and stream, and the choice of one by what the model then does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from obliteratus.causal.interventions import ablate, add_to_stream
from obliteratus.core.cost import Cost, prompt_count, variable
from obliteratus.core.errors import UserError
from obliteratus.core.progress import SILENT, note, progress, report_to
from obliteratus.core.shapes import Float
from obliteratus.core.types import Activations, Directions, Prompt, Subject
from obliteratus.distill.steps import NEGLIGIBLE_DIFFERENCE, compute_score
from obliteratus.inference.chat_template import Ids, render_prompts
from obliteratus.inference.hidden_states import read_hidden_states
from obliteratus.inference.logits import first_token_log_probs, kl_divergence
from obliteratus.inference.shared_prefix import common_prefix_length
from obliteratus.prompts import evenly_spaced

Positions = Annotated[int, Field(ge=1, le=64)]
"""At most so many of the template's last tokens."""
HeldOut = Annotated[int, Field(ge=1)]
"""Prompts of each group that candidates are judged on; means are taken on all others."""
MAX_DEPTH = 0.8  # candidates come from streams below this share of L: both papers leave out the last fifth


@dataclass(frozen=True)
class Candidate:
    """A difference of means, target − control."""

    position: int
    """Token, counted from the prompt's end."""
    stream: int
    vector: Float[Tensor, " width"]
    """At its own length, on the model's device."""


@dataclass(frozen=True)
class CandidateGrid:
    """All candidates, and what they are judged on."""

    candidates: tuple[Candidate, ...]
    deep: int
    """How many were left out for their depth."""
    held: Mapping[str, Ids]
    """Prompts of each group that no mean was taken on."""
    means: Mapping[str, Float[Tensor, "streams width"]]
    """At the last position, of the prompts that means were taken on."""


@dataclass
class CandidateTrial:
    """The model under one candidate. Counts the prompts that it passes, which is what a choice costs."""

    subject: Subject
    held: Mapping[str, Ids]
    passed: int = 0
    known: dict[str, Tensor] = field(default_factory=dict)
    """First tokens of the model as it is, by group."""

    def ablated(self, candidate: Candidate) -> AbstractContextManager[None]:
        """Nothing along it is written by any writer."""
        return ablate(self.subject, candidate.vector)

    def added(self, candidate: Candidate) -> AbstractContextManager[None]:
        """It is added to its own stream, at its own length, at every token."""
        return add_to_stream(self.subject, candidate.stream, candidate.vector)

    def first(self, inside: AbstractContextManager[None], group: str) -> Float[Tensor, "rows vocabulary"]:
        """First tokens' log-probabilities. A shared prefix is computed inside too, so reusing it is exact."""
        self.passed += len(self.held[group])
        with inside, report_to(SILENT):
            return first_token_log_probs(self.subject, self.held[group])

    def divergence(self, candidate: Candidate) -> float:
        """Mean KL(as it is ‖ ablated) of first tokens on control prompts, in nats."""
        return float(kl_divergence(self.known["control"], self.first(self.ablated(candidate), "control")).mean())


@dataclass(frozen=True)
class CandidateFilter:
    """What a candidate must satisfy."""

    option: str
    """The option that widens it."""
    measure: Callable[[Candidate], float]
    passes: Callable[[float], bool]


@dataclass(frozen=True)
class Choice:
    """The candidate that was chosen, what was measured of it, and how many each filter dropped before it."""

    candidate: Candidate
    rank: float
    measured: Mapping[str, float]
    dropped: Mapping[str, int]


# ------------------------------------------------------------------------------------- candidates
def count_template_suffix(subject: Subject, ids: Ids) -> int:
    """Number of last tokens that the template puts after every prompt: all rows share them, whatever was asked.

    Two one-letter prompts stand beside them, lest the question mark that all prompts end with be taken for the
    template's. Without a template 1, the prompt's own last token.
    """
    rows = [row[::-1] for row in ids + render_prompts(subject, [Prompt("a"), Prompt("1")])]
    return max(1, common_prefix_length(rows, leave=0))


def split_for_candidates(ids: Mapping[str, Ids], held: int, step: str) -> tuple[dict[str, Ids], dict[str, Ids]]:
    """(for means, held out), by group. Raises UserError where nothing would be left for the means."""
    fit: dict[str, Ids] = {}
    out: dict[str, Ids] = {}
    for group in ("target", "control"):
        rows = ids[group]
        if len(rows) <= held:
            raise UserError(
                f"distill step '{step}': held_out={held} leaves none of {len(rows)} usable {group} prompts for the "
                "means; lower held_out, or give more prompts"
            )
        places = set(evenly_spaced(len(rows), held))
        out[group] = [row for i, row in enumerate(rows) if i in places]
        fit[group] = [row for i, row in enumerate(rows) if i not in places]
    return fit, out


def compute_stream_means(subject: Subject, ids: Ids, positions: Sequence[int]) -> Float[Tensor, "positions streams width"]:
    """The stream's mean over prompts at each position, fp32 from an fp64 sum."""
    total = torch.zeros(subject.n_layers + 1, len(positions), subject.width, dtype=torch.float64)
    for reading in read_hidden_states(subject, ids, position=positions, title="DISTILL candidates"):
        total += reading.stream.double().sum(0)
    return (total / len(ids)).float().transpose(0, 1)


def make_grid(subject: Subject, ids: Mapping[str, Ids], positions: int, held_out: int, step: str) -> CandidateGrid:
    """Candidates at the last ``positions`` template tokens (fewer if it has fewer) × streams 1 … ⌊0.8 L⌋ − 1.

    Stream ℓ is the input of block ℓ. Stream 0 is left out: there a template's token is the same for all prompts.
    So are streams in which the difference is rounding.
    """
    fit, held = split_for_candidates(ids, held_out, step)
    n = min(positions, count_template_suffix(subject, ids["target"] + ids["control"]))
    means = {g: compute_stream_means(subject, rows, range(-n, 0)) for g, rows in fit.items()}
    delta = means["target"] - means["control"]
    size = means["target"].norm(dim=-1) + means["control"].norm(dim=-1)
    real = delta.norm(dim=-1) > NEGLIGIBLE_DIFFERENCE * size
    top = max(2, int(MAX_DEPTH * subject.n_layers))  # a model of two blocks has stream 1 at least
    places = [(p, s) for p in range(n) for s in range(1, subject.n_layers) if bool(real[p, s])]
    found = tuple(Candidate(p - n, s, delta[p, s].to(subject.device)) for p, s in places if s < top)
    if not found:
        raise UserError(f"distill step '{step}': the groups do not differ at any template token; check both files")
    return CandidateGrid(found, len(places) - len(found), held, {g: mean[-1] for g, mean in means.items()})


# ------------------------------------------------------------------------------------------ choice
def score_candidates(grid: CandidateGrid, measure: Callable[[Candidate], float], step: str) -> list[float]:
    """The score that candidates are ordered by, of each of them."""
    with progress(f"DISTILL {step}", len(grid.candidates)) as advance:

        def one(candidate: Candidate) -> float:
            value = measure(candidate)
            advance(1)
            return value

        return [one(candidate) for candidate in grid.candidates]


def choose_candidate(grid: CandidateGrid, ranks: Sequence[float], filters: Sequence[CandidateFilter], step: str) -> Choice:
    """The candidate of lowest rank that passes all filters; of equals the first. NaN never wins.

    Filters are measured in the order of ranks, until one candidate passes: measuring all of them first gives the
    same candidate, at about three times the cost. Raises UserError where none passes.
    """
    dropped: Counter[str] = Counter()
    order = sorted((r, i) for i, r in enumerate(ranks) if r == r)  # NaN is not equal to itself
    for rank, i in order:
        measured: dict[str, float] = {}
        for check in filters:
            measured[check.option] = check.measure(grid.candidates[i])
            if not check.passes(measured[check.option]):
                dropped[check.option] += 1
                break
        else:
            return Choice(grid.candidates[i], rank, measured, dropped)
    lost = ", ".join(f"{option} drops {n}" for option, n in dropped.items()) or "all their scores are NaN"
    widest = max(dropped, key=lambda option: dropped[option], default="positions")
    raise UserError(
        f"distill step '{step}': none of {len(ranks)} candidates passes the filters ({lost}); widen {widest}, "
        "or check that the model does behave differently on the two groups"
    )


def at_most(limit: float) -> Callable[[float], bool]:
    """Whether a value is no more than the limit; NaN is not."""
    return partial(lambda limit, value: value <= limit, limit)


def at_least(limit: float) -> Callable[[float], bool]:
    """Whether a value is no less than the limit; NaN is not."""
    return partial(lambda limit, value: value >= limit, limit)


def note_choice(step: str, choice: Choice, scores: str, grid: CandidateGrid, trial: CandidateTrial) -> None:
    """Note what was chosen, and what the choice cost."""
    best, n = choice.candidate, len(grid.candidates)
    lost = "".join(f", {option} dropped {count}" for option, count in choice.dropped.items())
    note(
        step,
        f"position {best.position}, stream {best.stream}: {scores}; {n} candidates, {grid.deep} too deep{lost} of "
        f"{sum(choice.dropped.values()) + 1} tested; {trial.passed} prompts passed",
    )


def estimate_grid_cost(options: Mapping[str, Any]) -> Cost:
    """Every candidate looked at three ways (ablated on targets and on controls, added on controls): the most."""
    each = 3 * options["positions"] * options["held_out"]
    return Cost(prompt_count("fit") + variable("L") * (MAX_DEPTH * each))


def repeat_at_all_streams(acts: Activations, vector: Float[Tensor, " width"], raw: float, unit: str) -> Directions:
    """One direction for all streams."""
    streams = len(acts["target"].mean)
    basis = normalize(vector.float().cpu(), dim=0).expand(streams, 1, -1).contiguous()
    return Directions(basis, compute_score(acts, basis), torch.full((streams,), raw), unit)
