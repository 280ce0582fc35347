"""Plans, pairs and losses for tests of TUNE."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from obliteratus.causal.interventions import Pair, compute_answer_logits
from obliteratus.causal.losses import ReferenceLogits
from obliteratus.core.types import Edit, Plan, Prompt, Subject
from obliteratus.excise.live.hooks import applied
from obliteratus.inference.chat_template import render_prompts
from obliteratus.tune.objective import LossTerms, control_loss, target_loss
from obliteratus.tune.parameters import EditParameters

KINDS = ["orthogonal", "anchored", "oblique", "rank 2", "least change"]
ANSWER = [5, 9, 12, 40, 41, 42]


def plan_for(subject: Subject, kind: str, strength: float = 0.7, seed: int = 0) -> Plan:
    """An edit of every writer of the upper half, along random directions."""
    g = torch.Generator().manual_seed(seed)
    edits = []
    for site in subject.sites:
        if site.role == "reads" or site.layer < subject.n_layers // 2 or site.part == "embed":
            continue
        k = 2 if kind in ("rank 2", "least change") else 1
        basis = torch.linalg.qr(torch.randn(subject.width, k, generator=g))[0].T.contiguous()
        along = None
        if kind == "oblique":
            along = basis + 0.3 * torch.randn(1, subject.width, generator=g)
            along = along / (along @ basis.T)
        if kind == "least change":  # covectors that read a part of what lies along the basis
            along = 0.4 * basis + 0.1 * torch.randn(k, subject.width, generator=g)
        anchor = torch.randn(subject.width, generator=g) if kind == "anchored" else None
        edits.append(Edit(site, basis, strength, "none", anchor, along))
    return Plan(tuple(edits), subject.source.digest)


def random_upper_plan(subject: Subject, make_plan: Any, **options: Any) -> Plan:
    """A random plan above block 0."""
    plan: Plan = make_plan(subject, strength=0.5, **options)
    return replace(plan, edits=tuple(e for e in plan.edits if e.site.layer > 0))


def prompt_pairs(subject: Subject, n: int = 5) -> list[Pair]:
    ids = render_prompts(subject, [Prompt(f"Tell me{' all' * i} about {x}?") for i, x in enumerate("abcdefg"[:n])])
    return [(row, ANSWER) for row in ids]


def control_terms(subject: Subject, own: ReferenceLogits, plan: Plan, pairs: list[Pair]) -> LossTerms:
    base = own.logp(pairs)
    with applied(subject, plan):
        return control_loss(compute_answer_logits(subject, pairs).log_softmax(-1), base, pairs)


def target_terms(subject: Subject, own: ReferenceLogits, plan: Plan, pairs: list[Pair], margin: float) -> LossTerms:
    base = own.logp(pairs)
    with applied(subject, plan):
        return target_loss(compute_answer_logits(subject, pairs).log_softmax(-1), base, pairs, margin)


def train_on_controls(subject: Subject, parameters: EditParameters, steps: int) -> None:
    ids = render_prompts(subject, [Prompt("Tell me about stars?"), Prompt("And about tides?")])
    pairs: list[Pair] = [(row, [5, 9, 12, 40, 41, 42]) for row in ids]
    own, optimizer = ReferenceLogits(subject), torch.optim.Adam(parameters.groups(0.05))
    for _ in range(steps):
        optimizer.zero_grad()
        control_terms(subject, own, parameters.to_live_plan(), pairs).kl.backward()
        optimizer.step()
