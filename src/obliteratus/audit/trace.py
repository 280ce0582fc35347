"""Traces what was done to a checkpoint: both models' tensors in turn, then the verdict and the plan over all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from obliteratus.audit.explain import explain_matrix, explain_vector
from obliteratus.audit.nearest import NearestRecipe, find_nearest_recipe
from obliteratus.audit.pairs import StoredModel, TensorPair, open_pair, stream_pairs
from obliteratus.audit.refusal import DirectionCosines
from obliteratus.audit.tensor_trace import NOISE, REQUANTIZATION, ROUNDING, VECTOR, TensorTrace
from obliteratus.audit.verdict import (
    SharedDirection,
    Verdict,
    find_shared_direction,
    judge_checkpoint,
    name_low_ranks,
)
from obliteratus.core.types import Edit, Plan, Shift, Source

# Share of a bias's move that must lie along the directions of its matrix's edit for the edit to have an anchor.
# An anchored edit moves it by s Bᵀ(A μ), wholly along them; other moves become a shift.
ANCHORED = 0.99


@dataclass(frozen=True)
class TraceReport:
    """What was done to EDITED."""

    edited: str
    base: str
    source: Source
    """The base, with the digest that the plan is bound to."""
    tensors: tuple[TensorTrace, ...]
    """Those that differ."""
    compared: int
    """Number of tensors of the edited model."""
    n_layers: int
    verdict: Verdict
    plan: Plan
    shared: SharedDirection | None = None
    nearest: NearestRecipe | None = None
    cosines: DirectionCosines | None = None
    parts: dict[str, int] | None = None
    """Number of sites by part, of writers and of whatever the plan edits."""

    @property
    def energy(self) -> float:
        """Squared length of the difference over all tensors."""
        return sum((trace.energy for trace in self.tensors), 0.0)

    @property
    def rounding(self) -> float:
        """Squared length that rounding is known to have given the difference."""
        return sum((trace.rounding for trace in self.tensors), 0.0)

    @property
    def explained(self) -> float:
        """Share (0–1) of the difference beyond rounding that the plan explains."""
        structured = [trace for trace in self.tensors if trace.kind != ROUNDING]
        whole = sum(max(trace.energy - trace.rounding, 0.0) for trace in structured)
        left_over = sum(max(trace.rest * trace.energy - trace.rounding, 0.0) for trace in structured)
        return 1 - left_over / whole if whole > 0 else 0.0

    @property
    def noise(self) -> float:
        """Share (0–1) of the difference that is like noise: rounding, requantization, or drawn."""
        whole = sum(trace.energy for trace in self.tensors)
        alone = (ROUNDING, REQUANTIZATION, NOISE)
        noise = sum(trace.energy * (1.0 if trace.kind in alone else trace.noise) for trace in self.tensors)
        return noise / whole if whole > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "edited": self.edited,
            "base": self.base,
            "compared": self.compared,
            "changed": len(self.tensors),
            "verdict": self.verdict.to_dict(),
            "explained": self.explained,
            "noise": self.noise,
            "size": self.energy**0.5,
            "direction": None if self.shared is None else {"share": self.shared.share, "tensors": self.shared.tensors},
            "cosines": None if self.cosines is None else self.cosines.to_dict(),
            "nearest": None if self.nearest is None else self.nearest.to_dict(),
            "plan": {"model": self.plan.model, "changes": len(self.plan.edits)},
            "tensors": [trace.to_dict() for trace in self.tensors],
        }


def trace_models(edited: str | Path, base: str | Path, trust_remote_code: bool = False) -> TraceReport:
    """Return what was done to ``edited``, whose base is ``base``. Each is a source as `locate` takes it.

    Raises UserError if the two cannot be compared.
    """
    with open_pair(edited, base, trust_remote_code) as (first, second):
        return trace_pair(first, second)


@torch.inference_mode()
def trace_pair(edited: StoredModel, base: StoredModel) -> TraceReport:
    """Return what was done to one opened model, compared with the other."""
    traces: list[TensorTrace] = []
    for pair in stream_pairs(edited, base):
        found = _explain(pair, base, traces)
        traces += [found] if found is not None else []
    named = name_low_ranks(traces)
    plan = Plan(tuple(change for trace in named for change in trace.changes), "")
    shared = find_shared_direction(named)
    source = replace(base.source, digest=base.digest_of_model())
    return TraceReport(
        edited.name,
        base.name,
        source,
        tuple(named),
        len(edited.shapes),
        base.n_layers,
        judge_checkpoint(named),
        replace(plan, model=source.digest),
        shared,
        find_nearest_recipe(named, plan, shared, base.n_layers),
        parts=_count_parts(base, plan),
    )


def _explain(pair: TensorPair, base: StoredModel, traces: Sequence[TensorTrace]) -> TensorTrace | None:
    if pair.before.ndim == 2 and not pair.bias_of:
        heads = int(base.model.config.get_text_config().num_attention_heads or 1)
        return explain_matrix(pair, None if pair.site is None else base.read_gain(pair.site), heads)
    found = explain_vector(pair)
    if not found.energy:
        return None
    site = pair.bias_of
    if site is None or site.role == "reads" or site.stacked or found.kind == ROUNDING:
        return found
    return explain_bias(found, pair, [c for t in traces if t.site == site for c in t.changes if isinstance(c, Edit)])


def explain_bias(found: TensorTrace, pair: TensorPair, edits: Sequence[Edit]) -> TensorTrace:
    """Return the trace of a writer's bias with the shift that moved it.

    What the edits of its matrix move it by themselves comes off first. A shift and an anchor do the same to the
    weights, so anchored edits too are written as a shift.
    """
    assert pair.bias_of is not None, "asked for only where it is the bias of a site"
    made = pair.before.double()
    for edit in edits:
        if edit.site.span is None:
            made = made - edit.strength * edit.basis.double().mT @ (edit.along.double() @ made)
    shift = (pair.after.double() - made).float()
    return replace(found, kind=VECTOR, changes=(Shift(pair.bias_of, shift),), rest=0.0)


def _count_parts(base: StoredModel, plan: Plan) -> dict[str, int]:
    edited = {change.site.part for change in plan.edits}
    parts = [site.part for site in base.sites if site.role == "writes" or site.part in edited]
    return {part: parts.count(part) for part in dict.fromkeys(parts)}
