"""Which parts of a method acted in a run, as its plan and record tell. The recipe's own text counts for nothing."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch

from obliteratus.core.results import Run
from obliteratus.core.types import Blend, Edit, Mask, Plan, Shift, Subject
from obliteratus.weights.matrices import has_bias


def list_parts(plan: Plan, run: Run, subject: Subject) -> list[str]:
    """Return the parts that acted, in words."""
    edits = [change for change in plan.edits if isinstance(change, Edit)]
    return [*_list_steps(run), *_list_edits(edits, subject), *_list_passes(run), *_list_others(plan)]


def _list_steps(run: Run) -> list[str]:
    """Return the distill steps that ran: those of the first pass, or of the trial that a search chose."""
    ran = run.passes[0]["steps"] if run.passes else [s.use for s in run.recipe.distill if s.when != "never"]
    return [str(step) for step in ran]


def _list_edits(edits: Sequence[Edit], subject: Subject) -> list[str]:
    strengths = {round(edit.strength, 6) for edit in edits if edit.site.part in ("attn.out", "mlp.out", "expert.out")}
    biased = [e for e in edits if e.site.role == "writes" and e.site.span is None]
    biased = [e for e in biased if has_bias(subject.module(e.site.path), e.site)]
    anchored = any(edit.anchor is not None for edit in edits)
    found = {
        f"{max((len(e.basis) for e in edits), default=0)} directions": True,
        f"norm {'/'.join(sorted({e.norm for e in edits} - {'none'}))}": any(e.norm != "none" for e in edits),
        "bias projection": bool(biased) and not anchored,
        "anchored": anchored,
        "oblique": any(edit.covectors is not None for edit in edits),
        f"heads ({_share_of_heads(edits, subject):.0%})": any(e.site.span is not None for e in edits),
        "single experts": any(e.site.expert is not None for e in edits),
        "experts' own directions": _has_own_directions(edits),
        "embeddings": any(e.site.part == "embed" for e in edits),
        "readers": any(e.site.role == "reads" for e in edits),
        f"strengths {min(strengths, default=0):.2f}–{max(strengths, default=0):.2f}": len(strengths) > 1,
        "reflection": max(strengths, default=0) > 1,
        "amplification": min(strengths, default=0) < 0,
    }
    return [name for name, acts in found.items() if acts]


def _share_of_heads(edits: Sequence[Edit], subject: Subject) -> float:
    """Return the mean share of heads that are edited, over the edited attention outputs."""
    heads = int(subject.model.config.get_text_config().num_attention_heads)
    spans = {(e.site.path, e.site.span) for e in edits if e.site.span is not None}
    return len(spans) / max(1, heads * len({path for path, _ in spans}))


def _has_own_directions(edits: Sequence[Edit]) -> bool:
    """Return whether two experts of one stack lose different directions."""
    single = [e for e in edits if e.site.expert is not None]
    stacks = (list(same) for _, same in groupby(single, key=lambda e: e.site.path))
    return any(not torch.equal(a.basis, same[0].basis) for same in stacks for a in same)


def _list_passes(run: Run) -> list[str]:
    found = [f"{len(run.passes)} passes"] if len(run.passes) > 1 else []
    found += [f"fitted in {run.seconds['TUNE']:.0f} s"] if "TUNE" in run.seconds else []
    return found + ([f"chosen among {run.search['trials']} trials"] if run.search else [])


def _list_others(plan: Plan) -> list[str]:
    masked = sum(len(change.neurons) for change in plan.edits if isinstance(change, Mask))
    blended = sum(isinstance(change, Blend) for change in plan.edits)
    found = {f"{masked} neurons masked": masked, f"{blended} experts blended": blended}
    steered = any(isinstance(change, Shift) for change in plan.edits)
    return [name for name, n in found.items() if n] + (["steering"] if steered else [])
