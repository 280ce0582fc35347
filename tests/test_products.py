"""Another library's matrix products: the same numbers, and only where they can be had."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from conftest import PlanMaker
from tiny import tiny_subject
from torch.nn.functional import linear

from obliteratus.excise.live import applied
from obliteratus.summon import products
from obliteratus.summon.products import product, quick_products


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [(3,), (200,), (4, 50)])
def test_products_are_linear_layers(rows: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    x, weight, b = torch.randn(*rows, 24), torch.randn(40, 24), torch.randn(40) if bias else None
    expected = linear(x.double(), weight.double(), None if b is None else b.double())
    with torch.inference_mode():
        torch.testing.assert_close(product(x, weight, b).double(), expected, rtol=1e-5, atol=1e-5)


def test_half_precision_goes_the_usual_way() -> None:
    x, weight = torch.randn(200, 24).bfloat16(), torch.randn(40, 24).bfloat16()
    with torch.inference_mode():
        assert torch.equal(product(x, weight, None), linear(x, weight))


@pytest.mark.parametrize("name", ["llama", "llama_biased", "gpt2", "mixtral", "gemma2"])
def test_models_compute_the_same_live_edits_too(name: str, make_plan: PlanMaker) -> None:
    subject, ids = tiny_subject(name), torch.randint(0, 256, (4, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), applied(subject, make_plan(subject, strength=1.5)):
        expected = subject.model(ids).logits
        with quick_products(subject):
            torch.testing.assert_close(subject.model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert not any("forward" in vars(module) for module in subject.model.modules())


@pytest.mark.skipif(not products.THERE, reason="no oneDNN in this build")
def test_the_blocks_layers_go_by_them(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = tiny_subject("llama")
    subject = replace(subject, model=copy.deepcopy(subject.model))
    ran = []
    monkeypatch.setattr(products, "product", lambda x, w, b: [ran.append(w.shape), linear(x, w, b)][1])
    with torch.inference_mode(), quick_products(subject):
        subject.model(torch.zeros(1, 4, dtype=torch.long))
    assert len(ran) == 7 * subject.n_layers
