"""On the organism a study finds where refusal lives, and agrees with what each block writes along the direction."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from obliteratus.analyze.run import run_analysis, select_analyses
from obliteratus.core.settings import Step
from obliteratus.core.types import PromptSet
from obliteratus.prompts import load_prompts
from obliteratus.study import KnockoutResult, Study
from obliteratus.study.engine import Engine
from obliteratus.summon.load import open_subject

TOPIC = "organism:astronomy"
# These blocks write what the last token reads; lower blocks act through what these read.
LAYERS = tuple(range(20, 30))


def ranks(values: list[float]) -> Tensor:
    """Mean ranks of equal values."""
    x = torch.tensor(values, dtype=torch.float64)
    return (x[:, None] > x[None]).double().sum(1) + ((x[:, None] == x[None]).double().sum(1) - 1) / 2


def agreement(a: list[float], b: list[float]) -> float:
    """Spearman's rank correlation."""
    return float(torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1])


@pytest.mark.organism
def test_blocks_that_write_refusal_are_those_without_which_it_falls() -> None:
    made = Study(
        model=TOPIC,
        data={"target": TOPIC, "control": TOPIC, "samples": 16},
        strategies=(Step(use="layers", layers=LAYERS),),
        metrics=(Step(use="behavior", tokens=12), Step(use="first_token_kl")),
    )
    subject = open_subject(TOPIC, dtype="bf16")
    prompts = PromptSet({group: members[::12] for group, members in load_prompts(TOPIC, TOPIC).groups.items()})
    engine = Engine.create(subject, made)
    results: list[KnockoutResult] = [r for batch in engine.batches() for r in engine.measure(batch)]
    parts = (
        run_analysis(subject, prompts, select_analyses(["decomposition"]), 0)
        .findings["decomposition"]
        .to_dict()["parts"]["of"]
    )
    written = [sum(parts[f"block {r.layer} {half}"]["value"] for half in ("attention", "mlp")) for r in results]
    fallen = [-r.change["refusal.target"].value for r in results]
    assert agreement(written, fallen) > 0.7  # 0.77 here; by chance above 0.56 five times in a hundred
    assert abs(agreement([float(r.layer % 5) for r in results], fallen)) < 0.7  # negative control
    harmless = [r for r in results if r.change["kl.first_token"].value < 1]
    lives = max(harmless, key=lambda r: -r.change["refusal.target"].value)
    assert lives.layer in (23, 27)
    assert lives.change["refusal.target"].high < -0.2
    assert all(abs(r.change["refusal.control"].value) <= 0.2 for r in results)
