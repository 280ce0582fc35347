"""The verdict on a checkpoint: what its changed tensors say together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from obliteratus.audit.tensor_trace import (
    FULL_RANK,
    LOW_RANK,
    NOISE,
    PROJECTION,
    REQUANTIZATION,
    ROUNDING,
    SCALING,
    UNKNOWN,
    VECTOR,
    ZEROED,
    TensorTrace,
)

ADAPTER, TRAINING, NOTHING, OBLIQUE = "adapter", "further training", "nothing", "oblique projection"
NAMES = {
    NOTHING: "nothing changed",
    ROUNDING: "stored in another dtype",
    REQUANTIZATION: "requantized",
    NOISE: "noise",
    SCALING: "scaled",
    PROJECTION: "a projection",
    ADAPTER: "an adapter of low rank, merged",
    TRAINING: "further training",
    ZEROED: "set to zero",
    VECTOR: "vectors moved",
    UNKNOWN: "unknown",
}
"""What each class is called in a sentence."""
# Thresholds. Measured on edits of the organism astronomy (ours) and on the adapter of weather-late, see
# docs/experiments/trace.md.
REACHABLE = 0.9  # share of a low-rank difference that left projections can make: all of it for ours
SHARED = 0.8  # mean squared cosine of the directions of one block's writers: 1.0 for ours, 0.47 for an adapter
ALIKE_STRENGTH = 0.25  # half the range of the middle 80 % of strengths, relative to their median: 0 for leace, > 1 else
LEAST_STRENGTH = 0.05  # a projection that removes less is none
FEW = 32  # largest rank of a projection: eight directions in three passes are 24
MOST_TRAINED = 0.02  # share of the squared difference in matrices of full rank above which a checkpoint was trained
TRAINED_TENSORS = 3  # matrices of full rank that training changes at the least; one alone stays unknown
MINOR = 0.02  # share of the squared difference below which a class is not named beside the main one


@dataclass(frozen=True)
class Verdict:
    """What was done to a checkpoint."""

    kind: str
    """The class that holds most of the squared difference."""
    oblique: bool = False
    shares: dict[str, float] | None = None
    """Share (0–1) of the squared difference by class, largest first."""

    @property
    def beside(self) -> list[str]:
        """Other classes that hold more than `MINOR` of the squared difference."""
        return [kind for kind, share in (self.shares or {}).items() if kind != self.kind and share > MINOR]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {"kind": self.kind, "oblique": self.oblique, "shares": self.shares or {}, "beside": self.beside}


def name_low_ranks(traces: Sequence[TensorTrace]) -> list[TensorTrace]:
    """Return the traces with each low-rank difference called a projection or an adapter.

    One matrix cannot tell an oblique projection from an adapter, since covectors can be found for any change. Together
    they can: a projection changes writers only, by changes that left projections can make, with the same strength
    everywhere or along directions that the writers of a block share.
    """
    low = [trace for trace in traces if trace.kind == LOW_RANK]
    projected = is_oblique_projection(low, traces)
    kind = PROJECTION if projected else ADAPTER
    return [replace(trace, kind=kind) if trace.kind == LOW_RANK else trace for trace in traces]


def is_oblique_projection(low: Sequence[TensorTrace], traces: Sequence[TensorTrace]) -> bool:
    """Return whether low-rank differences are oblique projections of writers."""
    if not low or any(trace.site is None or trace.site.role == "reads" for trace in low):
        return False
    if any(trace.kind in (FULL_RANK, VECTOR) and trace.part != "bias" for trace in traces):
        return False
    if any(trace.rank > FEW for trace in low) or min(trace.rows_reachable for trace in low) < REACHABLE:
        return False
    strengths = torch.tensor([trace.strength for trace in low], dtype=torch.float64)
    middle = float(strengths.median())
    low_end, high_end = (float(strengths.quantile(q)) for q in (0.1, 0.9))
    alike = middle > LEAST_STRENGTH and len(low) > 1 and (high_end - low_end) / 2 <= ALIKE_STRENGTH * middle
    shared = share_within_blocks(low)
    return alike or (shared is not None and shared >= SHARED)


def share_within_blocks(traces: Sequence[TensorTrace]) -> float | None:
    """Return the mean squared overlap (0–1) of the strongest directions of the writers of one block, or None."""
    overlaps = []
    for layer in {trace.layer for trace in traces}:
        own = [t.directions for t in traces if t.layer == layer and t.directions is not None]
        overlaps += [float((a[0] @ b.mT).square().sum()) for a in own for b in own if a is not b]
    return sum(overlaps) / len(overlaps) if overlaps else None


def judge_checkpoint(traces: Sequence[TensorTrace]) -> Verdict:
    """Return the verdict: the class of most of the squared difference that is beyond rounding."""
    energies: dict[str, float] = {}
    projected = {trace.site for trace in traces if trace.kind == PROJECTION}
    for trace in traces:
        # A bias that moved beside its projected matrix is what that edit keeps of the control group's mean.
        kind = PROJECTION if trace.kind == VECTOR and trace.site in projected and trace.site else trace.kind
        energies[kind] = energies.get(kind, 0.0) + trace.energy
        if trace.kind in (PROJECTION, ADAPTER) and trace.noise * trace.energy > trace.rounding * 2:
            noise = trace.noise * trace.energy
            energies[trace.kind] -= noise
            energies[NOISE] = energies.get(NOISE, 0.0) + noise
    if not energies:
        return Verdict(NOTHING, False, {})
    beyond = {kind: energy for kind, energy in energies.items() if kind != ROUNDING} or energies
    renamed = _name_training(traces, beyond)
    total = sum(renamed.values())
    shares = {kind: e / total for kind, e in sorted(renamed.items(), key=lambda item: -item[1])} if total else renamed
    kind = next(iter(shares))
    oblique = any(trace.oblique for trace in traces if trace.kind == PROJECTION)
    return Verdict(kind, kind == PROJECTION and oblique, shares)


def _name_training(traces: Sequence[TensorTrace], energies: dict[str, float]) -> dict[str, float]:
    """Return the energies with full-rank differences called training if there are enough of them, else unknown.

    What moved beside them, vectors and matrices that moved in few dimensions, belongs to the training too.
    """
    full = [trace for trace in traces if trace.kind == FULL_RANK]
    found = {kind: energy for kind, energy in energies.items() if kind != FULL_RANK}
    amount = energies.get(FULL_RANK, 0.0)
    if not full:
        return found
    trained = len(full) >= TRAINED_TENSORS and amount > MOST_TRAINED * sum(energies.values())
    name = TRAINING if trained else UNKNOWN
    found[name] = found.get(name, 0.0) + amount
    if trained:
        for kind in (VECTOR, ADAPTER):
            found[TRAINING] += found.pop(kind, 0.0)
    return found


# ---------------------------------------------------------------------------------- shared direction
@dataclass(frozen=True)
class SharedDirection:
    """The direction that the projections have in common."""

    direction: Tensor
    """Unit vector [width] in the coordinates of the stream."""
    share: float
    """Mean squared overlap (0–1) of the tensors' subspaces with it: 1 if all of them remove it."""
    tensors: int


def find_shared_direction(traces: Sequence[TensorTrace]) -> SharedDirection | None:
    """Return the unit vector with the largest mean squared overlap with what each projection removes; None if none."""
    own = [t.directions for t in traces if t.kind == PROJECTION and t.directions is not None]
    if not own:
        return None
    firsts = torch.cat([rows.double() for rows in own])
    _, _, right = torch.linalg.svd(firsts, full_matrices=False)
    direction = right[0]
    overlaps = [float((rows.double() @ direction).square().sum()) for rows in own]
    return SharedDirection(direction.float(), sum(overlaps) / len(overlaps), len(own))
