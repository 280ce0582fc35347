"""First-token KL and perplexity, against formulas written out anew, one prompt at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.plans import PlanMaker
from tests.support.tiny import tiny_subject

from obliteratus.core.errors import UserError
from obliteratus.core.types import PromptSet, Subject
from obliteratus.excise.live.hooks import applied
from obliteratus.inference.chat_template import render_prompts
from obliteratus.verify import Measurement, ScorerContext
from obliteratus.verify.drift import first_token_kl, perplexity


@pytest.fixture(scope="module")
def subject() -> Subject:
    return tiny_subject("llama")


def measured_before(subject: Subject, prompts: PromptSet, verdicts: list[str]) -> Measurement:
    found = first_token_kl(ScorerContext(subject, prompts, None))
    records = [{"group": "control", "verdict": v} for v in verdicts] + [{"group": "target", "verdict": "absent"}]
    return Measurement(found.scores, records, found.tensors)


def test_first_token_kl(subject: Subject, prompts: PromptSet, make_plan: PlanMaker) -> None:
    before = measured_before(subject, prompts, ["absent", "shown", "absent", "degenerate"])
    assert not before.scores
    same = first_token_kl(ScorerContext(subject, prompts, before))
    assert {s.value for s in same.scores.values()} == {0.0}
    with applied(subject, make_plan(subject)):
        found = first_token_kl(ScorerContext(subject, prompts, before))
        logp = [subject.model(torch.tensor([r])).logits[0, -1] for r in render_prompts(subject, prompts["control"])]
    after = torch.stack(logp).double().log_softmax(-1)
    base = before.tensors["first_token.control"].double()
    expected = (base.exp() * (base - after)).sum(-1)
    torch.testing.assert_close(found.items["kl.first_token"].values.double(), expected, rtol=1e-3, atol=1e-5)
    values = {name: s.value for name, s in found.scores.items()}
    assert values["kl.first_token.mean"] == pytest.approx(expected.mean().item(), rel=1e-3)
    assert values["kl.first_token.p95"] == pytest.approx(expected.quantile(0.95).item(), rel=1e-3)
    assert values["kl.first_token.answered.mean"] == pytest.approx(expected[[0, 2]].mean().item(), rel=1e-3)
    assert found.scores["kl.first_token.answered.mean"].n == 2


def test_without_answered_controls_there_is_no_such_score(subject: Subject, prompts: PromptSet) -> None:
    before = measured_before(subject, prompts, ["shown"] * 4)
    names = set(first_token_kl(ScorerContext(subject, prompts, before)).scores)
    assert names == {f"kl.first_token.{tail}" for tail in ("mean", "p95", "p99")}


# -------------------------------------------------------------------------------------------- perplexity
TEXTS = ["a short one", "a much longer paragraph, so that the short one is padded", "b", "third\nover two lines"]


def test_perplexity_is_the_texts_own(
    subject: Subject, prompts: PromptSet, make_plan: PlanMaker, tmp_path: Path
) -> None:
    (tmp_path / "texts.txt").write_text("\n\n".join(TEXTS))
    options: dict[str, Any] = {"texts": str(tmp_path / "texts.txt")}
    losses = []
    for text in TEXTS:
        row = subject.tokenizer(" ".join(text.split()))["input_ids"]
        if len(row) > 1:  # one token alone has no loss
            logp = subject.model(torch.tensor([row])).logits[0, :-1].double().log_softmax(-1)
            losses.append(-logp.gather(1, torch.tensor(row[1:])[:, None]).mean())
    expected = torch.stack(losses)
    before = perplexity(ScorerContext(subject, prompts, None), **options)
    torch.testing.assert_close(before.items["perplexity"].values.double(), expected, rtol=1e-4, atol=1e-5)
    assert before.scores["perplexity"].value == pytest.approx(expected.mean().exp().item(), rel=1e-4)
    assert before.scores["perplexity"].n == 3
    assert "perplexity.ratio" not in before.scores
    same = perplexity(ScorerContext(subject, prompts, before), **options)
    assert same.scores["perplexity.ratio"].value == pytest.approx(1, abs=1e-6)
    with applied(subject, make_plan(subject, strength=2.0)):
        after = perplexity(ScorerContext(subject, prompts, before), **options).scores
    assert after["perplexity.ratio"].value == pytest.approx(
        after["perplexity"].value / before.scores["perplexity"].value, rel=1e-4
    )


def test_perplexity_has_texts_of_its_own(subject: Subject, prompts: PromptSet) -> None:
    assert perplexity(ScorerContext(subject, prompts, None)).scores["perplexity"].n >= 8
    with pytest.raises(UserError, match="no such text file"):
        perplexity(ScorerContext(subject, prompts, None), texts="/nowhere.txt")
