"""Candidate directions at template positions and streams, and the choice of one by its effect on the model."""

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
"""How many of the template's last tokens give candidates."""
HeldOut = Annotated[int, Field(ge=1)]
"""Held-out prompts of each group, on which candidates are compared; means are taken over all others."""
MAX_DEPTH = 0.8  # candidates come from streams below this share of L: both papers leave out the last fifth


@dataclass(frozen=True)
class Candidate:
    """A difference of means, target − control, at one position and stream."""

    position: int
    """Token position, counted from the prompt's end: −1 is the last."""
    stream: int
    vector: Float[Tensor, " width"]
    """Not normalized; on the model's device."""


@dataclass(frozen=True)
class CandidateGrid:
    """All candidates, and the held-out prompts they are compared on."""

    candidates: tuple[Candidate, ...]
    n_too_deep: int
    """How many candidates were left out because their stream is too deep."""
    held_out: Mapping[str, Ids]
    """Prompts of each group that no mean was taken over."""
    means: Mapping[str, Float[Tensor, "streams width"]]
    """Each group's mean stream at the last position."""
    control: Float[Tensor, "positions streams width"]
    """The control group's mean stream at each position, the last one last."""


@dataclass
class CandidateTrial:
    """Runs the held-out prompts under one candidate, and counts them: that is what a choice costs."""

    subject: Subject
    held_out: Mapping[str, Ids]
    n_prompts_run: int = 0
    baseline: dict[str, Tensor] = field(default_factory=dict)
    """First tokens' log-probabilities of the unedited model, by group."""

    def ablate(self, candidate: Candidate) -> AbstractContextManager[None]:
        """Return a context inside which no writer writes along the candidate."""
        return ablate(self.subject, candidate.vector)

    def add(self, candidate: Candidate) -> AbstractContextManager[None]:
        """Return a context inside which the candidate is added to its own stream at every token."""
        return add_to_stream(self.subject, candidate.stream, candidate.vector)

    def read_first_tokens(self, inside: AbstractContextManager[None], group: str) -> Float[Tensor, "rows vocabulary"]:
        """Return first tokens' log-probabilities inside a context; the shared prefix is computed inside it too."""
        self.n_prompts_run += len(self.held_out[group])
        with inside, report_to(SILENT):
            return first_token_log_probs(self.subject, self.held_out[group])

    def ablation_kl(self, candidate: Candidate) -> float:
        """Return the mean KL(unedited ‖ ablated) of first tokens on control prompts, in nats."""
        return float(
            kl_divergence(self.baseline["control"], self.read_first_tokens(self.ablate(candidate), "control")).mean()
        )


@dataclass(frozen=True)
class CandidateFilter:
    """A condition that a candidate must satisfy."""

    option: str
    """The step's option that sets the limit."""
    measure: Callable[[Candidate], float]
    passes: Callable[[float], bool]


@dataclass(frozen=True)
class Choice:
    """The chosen candidate, its measured values by filter option, and how many candidates each filter dropped."""

    candidate: Candidate
    rank: float
    measured: Mapping[str, float]
    dropped: Mapping[str, int]


# ------------------------------------------------------------------------------------- candidates
def count_template_suffix(subject: Subject, ids: Ids) -> int:
    """Return how many last tokens the template puts after every prompt; 1, the prompt's last token, without template.

    Two one-letter prompts are compared as well, so that a question mark that all prompts end with does not count as
    part of the template.
    """
    rows = [row[::-1] for row in ids + render_prompts(subject, [Prompt("a"), Prompt("1")])]
    return max(1, common_prefix_length(rows, leave=0))


def split_for_candidates(ids: Mapping[str, Ids], n_held_out: int, step: str) -> tuple[dict[str, Ids], dict[str, Ids]]:
    """Split each group into (prompts for the means, held-out prompts). Raises UserError if no mean is possible."""
    fit: dict[str, Ids] = {}
    held_out: dict[str, Ids] = {}
    for group in ("target", "control"):
        rows = ids[group]
        if len(rows) <= n_held_out:
            raise UserError(
                f"distill step '{step}': held_out={n_held_out} leaves none of {len(rows)} usable {group} prompts for "
                "the means; lower held_out, or give more prompts"
            )
        chosen = set(evenly_spaced(len(rows), n_held_out))
        held_out[group] = [row for i, row in enumerate(rows) if i in chosen]
        fit[group] = [row for i, row in enumerate(rows) if i not in chosen]
    return fit, held_out


def compute_stream_means(
    subject: Subject, ids: Ids, positions: Sequence[int]
) -> Float[Tensor, "positions streams width"]:
    """Return the mean of the stream over prompts at each position, fp32 from an fp64 sum."""
    total = torch.zeros(subject.n_layers + 1, len(positions), subject.width, dtype=torch.float64)
    for reading in read_hidden_states(subject, ids, position=positions, title="DISTILL candidates"):
        total += reading.stream.double().sum(0)
    return (total / len(ids)).float().transpose(0, 1)


def make_grid(subject: Subject, ids: Mapping[str, Ids], positions: int, held_out: int, step: str) -> CandidateGrid:
    """Return candidates at the last ``positions`` template tokens (or all it has) × streams 1 … ⌊0.8 L⌋ − 1.

    Stream ℓ is the input of block ℓ. Stream 0 is left out, because a template token is the same there for all prompts,
    and so are streams in which the difference is rounding error. Raises UserError if no candidate is left.
    """
    fit, held_out_ids = split_for_candidates(ids, held_out, step)
    n = min(positions, count_template_suffix(subject, ids["target"] + ids["control"]))
    means = {g: compute_stream_means(subject, rows, range(-n, 0)) for g, rows in fit.items()}
    delta = means["target"] - means["control"]
    size = means["target"].norm(dim=-1) + means["control"].norm(dim=-1)
    real = delta.norm(dim=-1) > NEGLIGIBLE_DIFFERENCE * size
    top = max(2, int(MAX_DEPTH * subject.n_layers))  # a model of two blocks has stream 1 at least
    places = [(p, s) for p in range(n) for s in range(1, subject.n_layers) if bool(real[p, s])]
    candidates = tuple(Candidate(p - n, s, delta[p, s].to(subject.device)) for p, s in places if s < top)
    if not candidates:
        raise UserError(
            f"distill step '{step}': the groups do not differ at any template token; check both prompt files"
        )
    return CandidateGrid(
        candidates,
        len(places) - len(candidates),
        held_out_ids,
        {g: mean[-1] for g, mean in means.items()},
        means["control"],
    )


# ------------------------------------------------------------------------------------------ choice
def score_candidates(grid: CandidateGrid, measure: Callable[[Candidate], float], step: str) -> list[float]:
    """Return the measured value of each candidate, by which they will be ranked."""
    with progress(f"DISTILL {step}", len(grid.candidates)) as advance:

        def measure_one(candidate: Candidate) -> float:
            value = measure(candidate)
            advance(1)
            return value

        return [measure_one(candidate) for candidate in grid.candidates]


def choose_candidate(
    grid: CandidateGrid, ranks: Sequence[float], filters: Sequence[CandidateFilter], step: str
) -> Choice:
    """Return the candidate of lowest rank that passes all filters; the first of equal ones. NaN never wins.

    Candidates are filtered in the order of their ranks until one passes: filtering all of them first gives the same
    candidate at about three times the cost. Raises UserError if none passes.
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
    """Return a test of whether a value is at most the limit; NaN is not."""
    return partial(lambda limit, value: value <= limit, limit)


def at_least(limit: float) -> Callable[[float], bool]:
    """Return a test of whether a value is at least the limit; NaN is not."""
    return partial(lambda limit, value: value >= limit, limit)


def note_choice(step: str, choice: Choice, scores: str, grid: CandidateGrid, trial: CandidateTrial) -> None:
    """Report which candidate was chosen, and what the choice cost."""
    best, n = choice.candidate, len(grid.candidates)
    lost = "".join(f", {option} dropped {count}" for option, count in choice.dropped.items())
    note(
        step,
        f"position {best.position}, stream {best.stream}: {scores}; {n} candidates, {grid.n_too_deep} too deep{lost} "
        f"of {sum(choice.dropped.values()) + 1} tested; {trial.n_prompts_run} prompts run",
    )


def estimate_grid_cost(options: Mapping[str, Any]) -> Cost:
    """Return the most that a choice can cost: each candidate ablated on targets and controls, and added on controls."""
    each = 3 * options["positions"] * options["held_out"]
    return Cost(prompt_count("fit") + variable("L") * (MAX_DEPTH * each))


def repeat_at_all_streams(
    acts: Activations, vector: Float[Tensor, " width"], raw: float, unit: str, stream: int | None = None
) -> Directions:
    """Return directions with this one vector, normalized, at every stream. stream: the one that it comes from."""
    streams = len(acts["target"].mean)
    basis = normalize(vector.float().cpu(), dim=0).expand(streams, 1, -1).contiguous()
    origin = None if stream is None else (stream, float(vector.norm()))
    return Directions(basis, compute_score(acts, basis), torch.full((streams,), raw), unit, origin=origin)
