"""The answers that a plan is tuned on, and the ablation that gets them where the plan is too weak."""

from __future__ import annotations

import pytest
import torch
from tests.support.refuser import REFUSAL, asked, byte, refuser
from tests.support.tiny import tiny_subject
from tests.support.tuning import plan_for

from obliteratus.core.errors import UserError
from obliteratus.core.types import Edit, Plan, Prompt, Subject
from obliteratus.excise.live.hooks import applied
from obliteratus.inference.chat_template import render_prompts
from obliteratus.inference.generate import generate
from obliteratus.inference.hooks import decoder_blocks
from obliteratus.judge.judge import Judge
from obliteratus.tune import targets
from obliteratus.tune.targets import (
    OPENING_LENGTHS,
    ablate_every_writer,
    continue_openings,
    find_answering_pairs,
    unfold_gain,
)


def test_answers_are_gone_on_with_by_the_base_from_the_shortest_opening(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here an answer refuses unless its third token is the plan's: so three are needed, where the plan's differ."""
    subject = tiny_subject("llama")
    plan = plan_for(subject, "orthogonal", strength=3.0)
    ids = render_prompts(subject, [Prompt(f"Tell me about {x}?") for x in "abcdef"])
    with applied(subject, plan):
        openings = dict(zip(map(str, ids), generate(subject, ids, 4), strict=True))
    thirds = {tuple(row[:3]) for row in openings.values()}
    monkeypatch.setattr(targets, "does_answer", lambda subject, answer, judge: tuple(answer[:3]) in thirds)
    found = continue_openings(subject, [(row, openings[str(row)]) for row in ids], 10, Judge())
    assert sorted(str(row) for row, _ in found) == sorted(map(str, ids))
    for row, answer in found:
        opening = openings[str(row)]
        tried = [opening[:n] + generate(subject, [row + opening[:n]], 10 - n)[0] for n in OPENING_LENGTHS]
        assert answer == next(a for a in tried if tuple(a[:3]) in thirds)
    assert any(answer[:4] != openings[str(row)] for row, answer in found)  # behind the opening it is not the plan's


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("oblique", [False, True])
def test_insisting_ablates_everywhere(name: str, oblique: bool) -> None:
    """Golden: after a plan of one edit, its stream rows are in the stream of no block. A weak plan leaves them."""
    subject = tiny_subject(name)
    site = next(s for s in subject.sites if s.part == "mlp.out" and s.layer == 1)
    row = torch.nn.functional.normalize(torch.randn(1, subject.width, generator=torch.Generator().manual_seed(3)))
    edit = Edit(site, row, 0.2, covectors=row.clone() if oblique else None)
    plan = Plan((edit,), subject.source.digest)
    d = torch.nn.functional.normalize(unfold_gain(subject, edit))[0]
    assert _along(subject, ablate_every_writer(subject, plan), d) < 1e-3 < 0.05 < _along(subject, plan, d)


def _along(subject: Subject, plan: Plan, d: torch.Tensor) -> float:
    found: list[torch.Tensor] = []
    handles = [
        b.register_forward_hook(lambda m, a, y: found.append((y[0] if isinstance(y, tuple) else y) @ d))
        for b in decoder_blocks(subject)
    ]
    with torch.no_grad(), applied(subject, plan):
        subject.model(torch.tensor([[1, 2, 3, 4, 5]]))
    for handle in handles:
        handle.remove()
    return float(torch.stack(found).abs().max())


def axis_plan(subject: Subject, axis: int, strength: float) -> Plan:
    site = next(s for s in subject.sites if s.part == "attn.out" and s.layer == 2)
    return Plan((Edit(site, torch.eye(subject.width)[axis][None], strength),), subject.source.digest)


def test_refused_prompts_are_asked_again_under_a_stronger_edit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan too weak to end a refusal still gets answers; one along an axis that is not the refusal gets none."""
    subject = refuser()
    no = byte(subject.tokenizer, "N")
    monkeypatch.setattr(targets, "does_answer", lambda subject, answer, judge: answer[0] != no)
    ids = render_prompts(subject, asked()["target"])
    with applied(subject, axis_plan(subject, REFUSAL, 0.1)):
        assert {a[0] for a in generate(subject, ids, 6)} == {no}
    assert len(find_answering_pairs(subject, ids, axis_plan(subject, REFUSAL, 0.1), 6, Judge())) == len(ids)
    with pytest.raises(UserError, match="every answer to a target prompt shows refusal"):
        find_answering_pairs(subject, ids, axis_plan(subject, 9, 0.1), 6, Judge())
