"""What streams know of the next token: maps against the textbook, a planted answer, and nothing in noise."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from tests.support.contexts import (
    check_finding,
    context_of_model,
    refusing_context,
    with_random_direction,
)
from tests.support.refuser import asked
from tests.support.tiny import tiny_subject
from torch import Tensor

from obliteratus.analyze.readout import compute_next_token_log_probs
from obliteratus.analyze.tuned_lens import fit_map, measure_tuned_lens, score_lenses


def noise(rows: int, width: int, seed: int) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def test_a_map_is_found_and_predicts_new_rows() -> None:
    turn, x, new = noise(8, 8, 0), noise(60, 8, 1), noise(30, 8, 2)
    found = fit_map(x, x @ turn + 3)
    assert torch.allclose(found(new), new @ turn + 3, atol=0.01)
    assert not found.identity
    near = fit_map(x, x + 0.01 * noise(60, 8, 3) + 3)
    assert near.identity
    assert torch.allclose(near(new), new + 3, atol=0.02)


def test_the_dual_form_is_the_textbook_s() -> None:
    """(XᵀX + λI)⁻¹XᵀY, with every penalty's error by leaving the hat matrix' trace out, as published."""
    x, y = noise(12, 20, 0).double(), noise(12, 20, 1).double()
    found = fit_map(x.float(), y.float())
    xc, yc = x - x.mean(0), y - y.mean(0)
    unit = (xc @ xc.T).diagonal().mean()
    errors = []
    for identity in (True, False):
        rest = yc - xc if identity else yc
        for power in range(-8, 7):
            penalty = unit * 10 ** (power / 2)
            a = torch.linalg.solve(xc.T @ xc + penalty * torch.eye(20), xc.T @ rest)
            hat = xc @ torch.linalg.solve(xc.T @ xc + penalty * torch.eye(20), xc.T) + 1 / 12
            error = (rest - xc @ a).square().sum() / 12 / (1 - hat.trace() / 12) ** 2
            errors.append((float(error), identity, a))
    best, identity, a = min(errors, key=lambda e: e[0])
    assert found.error == pytest.approx(best, rel=1e-4)
    assert found.identity == identity
    new = noise(5, 20, 2).double()
    expected = y.mean(0) + (new - x.mean(0)) @ (a + identity * torch.eye(20))
    assert torch.allclose(found(new.float()).double(), expected, atol=1e-4)


def test_unrelated_rows_are_mapped_to_their_mean() -> None:
    """Where rows tell nothing, the map leaves at most a few hundredths of their spread."""
    found = fit_map(noise(200, 8, 0), noise(200, 8, 1))
    assert float((found(noise(50, 8, 2)) - found.target.float()).square().mean()) < 0.06


@pytest.mark.parametrize("block", [2, 5])
def test_the_stream_from_which_the_answer_is_known_is_found(block: int) -> None:
    context = refusing_context(block=block)
    found = measure_tuned_lens(context)
    assert found.significant == list(range(block + 1, 8))
    assert found.tuned[block + 1].value < 0.1 * found.constant.value
    assert found.constant.value == pytest.approx(found.tuned[block].value, abs=1e-3)
    assert found.promoted[-1][0] == "N"
    assert f"from stream {block + 1} on" in found.summary()
    check_finding(found, ["stream", "KL to the model (nats)"])


def test_kl_is_of_the_model_to_the_lens() -> None:
    context = context_of_model(tiny_subject("gemma2"), asked())
    found = measure_tuned_lens(context)
    model = copy.deepcopy(context.subject.model).double()
    rows = torch.cat([context.activations[g].rows for g in ("target", "control")]).double()
    with torch.no_grad():
        logits = [model.lm_head(model.model.norm(x)) for x in (rows[:, -1], rows[:, 1])]
    true, seen = (torch.log_softmax(30 * torch.tanh(x / 30), -1) for x in logits)  # Gemma 2's soft cap
    expected = (true.exp() * (true - seen)).sum(-1).mean()
    assert found.logit[1].value == pytest.approx(float(expected), rel=1e-3)


def test_pairs_that_do_not_belong_together_tell_nothing() -> None:
    context = context_of_model(tiny_subject("llama"), asked())
    fit = torch.cat([context.activations[g].rows for g in ("target", "control")])
    ends = fit[torch.randperm(len(fit), generator=torch.Generator().manual_seed(0)), -1]
    maps = [fit_map(fit[:, stream], ends) for stream in range(3)]
    assert score_lenses(context, maps, fit, compute_next_token_log_probs(context.subject, fit[:, -1])).significant == []


def test_prompts_that_are_all_the_same_tell_nothing() -> None:
    prompts = asked()
    same = replace(prompts, groups={g: (prompts["control"][0],) * 6 for g in ("target", "control")})
    found = measure_tuned_lens(with_random_direction(context_of_model(tiny_subject("llama"), same)))
    assert found.significant == []
    assert found.constant.value == pytest.approx(0, abs=1e-5)
    assert "no stream tells" in found.summary()
