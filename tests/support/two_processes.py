"""What a subject gives, to be compared between ways of holding it; as a program, on its part of a parted model."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from obliteratus.core.errors import UserError
from obliteratus.core.probing import ProbeRequest
from obliteratus.core.types import Edit, Mask, Plan, Prompt, PromptSet, Subject
from obliteratus.excise.live.hooks import applied
from obliteratus.excise.live.hooks_per_row import applied_per_row
from obliteratus.inference.chat_template import render_prompts
from obliteratus.inference.generate import generate
from obliteratus.inference.logits import first_token_log_probs
from obliteratus.inference.token_losses import token_losses
from obliteratus.probe.probe import collect_activations
from obliteratus.summon.load import open_subject
from obliteratus.weights.matrices import read_weight

PROMPTS = PromptSet(
    {
        "target": tuple(Prompt(f"tell me about the stars, number {n * n * 7}") for n in range(5)),
        "control": tuple(Prompt(f"what grows in a garden of {n} beds" + "?" * n) for n in range(6)),
    }
)
IDS_OF = [*PROMPTS.groups["target"], *PROMPTS.groups["control"]]


def basis(width: int, seed: int) -> torch.Tensor:
    """Two orthonormal rows."""
    noise = torch.randn(width, 2, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(noise)[0].T.contiguous()


def plans(subject: Subject) -> dict[str, Plan]:
    """Of every kind of edit that can go wrong in its own way where a matrix is elsewhere or parted."""
    q = basis(subject.width, 3)
    writers = [s for s in subject.sites if s.part in ("attn.out", "mlp.out", "expert.out")]
    mlps = [s for s in writers if s.part == "mlp.out"]
    readers = [s for s in subject.sites if s.role == "reads" and s.part in ("attn.in", "mlp.in")]
    spans = [replace(s, span=(8, 16)) for s in writers if s.part == "attn.out"]
    edits: dict[str, list[Any]] = {
        rule: [Edit(s, q, 1.0, rule) for s in writers] for rule in ("none", "columns", "rows")
    }
    edits["heads"] = [Edit(s, q, 1.0) for s in spans]
    edits["heads under a rule"] = [Edit(s, q, 0.7, "columns") for s in spans]
    edits["readers"] = [Edit(s, q, 1.0) for s in readers]
    edits["neurons"] = [Mask(s, torch.tensor([1, 5, 30, 31, 40])) for s in mlps]
    edits["embeddings"] = [Edit(s, q, 1.0, "columns") for s in subject.sites if s.part == "embed"]
    return {name: Plan(tuple(of), subject.source.digest) for name, of in edits.items() if of}


def measured(subject: Subject) -> dict[str, Any]:
    """Digest, activations, answers and losses; first tokens under each plan. All tensors on the CPU."""
    ids = render_prompts(subject, IDS_OF)
    outs = [s.path for s in subject.sites if s.part in ("attn.out", "mlp.out")]
    acts = collect_activations(subject, PROMPTS, request=ProbeRequest(outs, outs))
    found: dict[str, Any] = {"digest": subject.source.digest, "plain": first_token_log_probs(subject, ids)}
    found["stream"] = torch.stack([acts[group].mean for group in PROMPTS.groups])
    found["outputs"] = torch.stack(list(acts.outputs.values())) if outs else torch.zeros(1)
    found["inputs"] = torch.cat([mean for of in acts.inputs.values() for mean in of.values()] or [torch.zeros(1)])
    found["losses"] = torch.cat(token_losses(subject, ids))
    found["answers"] = generate(subject, ids, 5)
    found["weights"] = [read_weight(subject.module(s.path), s).float() for s in subject.sites if not s.stacked]
    for name, plan in plans(subject).items():
        with applied(subject, plan):
            found[name] = first_token_log_probs(subject, ids)
    several = list(plans(subject).values())
    with applied_per_row(subject, several[:3], [i % 3 for i in range(len(ids))]):
        found["rows together"] = first_token_log_probs(subject, ids)
    return found


def main(out: Path, *folders: Path) -> None:
    """Run one process of several: save what it measures of each model, or the error, into a file of its own."""
    for folder in folders:
        file = out / f"{folder.name}-rank{os.environ['RANK']}.pt"
        try:
            torch.save(measured(open_subject(folder, device="tp")), file)
        except UserError as error:
            torch.save({"error": str(error)}, file)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
