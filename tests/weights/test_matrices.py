"""Stored weights: every layout reads as [out, in] and goes back bit for bit."""

from __future__ import annotations

import pytest
import torch
from tests.support.tiny import MODELS, tiny, tiny_subject
from torch import nn
from transformers.pytorch_utils import Conv1D

from obliteratus.core.errors import UnsupportedModelError
from obliteratus.core.types import Site
from obliteratus.summon.sites import find_architecture, find_sites, stream_width
from obliteratus.weights.matrices import (
    convert_to_stored,
    count_inputs,
    count_outputs,
    expand_experts,
    has_bias,
    read_bias,
    read_weight,
)

NAMES = sorted(MODELS)
SITE = Site("a.b", 0, "attn.out", "writes", "linear")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["gpt2", "mistral", "gemma2"])
def test_round_trip(name: str, dtype: torch.dtype) -> None:
    subject = tiny_subject(name)
    subject.model.to(dtype)
    for site in subject.sites:
        module = subject.module(site.path)
        weight = read_weight(module, site)
        assert weight.dtype == torch.float32
        back = convert_to_stored(weight, site, module.weight)
        assert torch.equal(back, module.weight)
        assert back.dtype == dtype
        assert back.is_contiguous()


@pytest.mark.parametrize("name", NAMES)
def test_the_matrix_is_what_the_module_computes(name: str) -> None:
    model = tiny(name).double()
    for site in find_sites(model, find_architecture(model.config)):
        module = model.get_submodule(site.path)
        if not isinstance(module, nn.Linear | nn.Embedding | Conv1D):
            continue  # stacks and routers: below
        weight, bias = read_weight(module, site), read_bias(module, site)
        assert weight.dtype == torch.float64
        if site.layout == "embedding":  # one-hot in; a fixed factor or offset of the model's own stands outside
            ids = torch.tensor([0, 3, 200])
            given, out = nn.functional.one_hot(ids, weight.shape[1]).double(), module.weight[ids]
        else:
            given = torch.randn(5, weight.shape[1], dtype=torch.float64)
            out = module(given)
        expected = given @ weight.T + (0.0 if bias is None else bias)
        assert torch.allclose(out, expected, rtol=1e-12, atol=1e-12)
        if site.role == "writes":
            assert weight.shape[0] == stream_width(model)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "nemotron_h"])
def test_an_experts_matrix_is_what_the_expert_computes(name: str) -> None:
    """One expert is chosen for all tokens, with weight 1: the module puts out what its matrices make."""
    subject = tiny_subject(name)
    stacks = [site for site in subject.sites if site.stacked]
    writer = next(site for site in stacks if site.role == "writes")
    reader = next(site for site in stacks if site.path == writer.path and site.role == "reads")
    module = subject.module(writer.path)
    x = torch.randn(5, subject.width)
    for expert, (down, up) in enumerate(
        zip(expand_experts(module, writer), expand_experts(module, reader), strict=True)
    ):
        made = x @ read_weight(module, up).T + (0.0 if not has_bias(module, up) else read_bias(module, up))
        hidden = module._apply_gate(made) if module.has_gate else module.act_fn(made)
        out = hidden @ read_weight(module, down).T + (0.0 if not has_bias(module, down) else read_bias(module, down))
        found = module(x, torch.full((5, 1), expert), torch.ones(5, 1))
        torch.testing.assert_close(found, out, rtol=1e-4, atol=1e-4)
        assert (count_outputs(module, down), count_inputs(module, down)) == tuple(read_weight(module, down).shape)
        assert torch.equal(
            convert_to_stored(read_weight(module, down), down, module.down_proj[expert]), module.down_proj[expert]
        )


def test_a_router_is_a_matrix_too() -> None:
    subject = tiny_subject("mixtral")
    site = next(site for site in subject.sites if site.part == "router")
    x = torch.randn(5, subject.width)
    module = subject.module(site.path)
    torch.testing.assert_close(module(x)[0], x @ read_weight(module, site).T)


def test_biases() -> None:
    assert all(read_bias(m, s) is not None for m, s in _blocks("gpt2"))
    assert all(read_bias(m, s) is None for m, s in _blocks("llama"))


def _blocks(name: str) -> list[tuple[nn.Module, Site]]:
    subject = tiny_subject(name)
    return [(subject.module(s.path), s) for s in subject.sites if s.part not in ("embed", "unembed")]


class Params4bit(nn.Parameter):
    """A packed weight, as bitsandbytes stores one."""


def holding(weight: nn.Parameter) -> nn.Module:
    module = nn.Linear(4, 4)
    module.weight = weight
    return module


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (
            holding(nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)),
            r"a\.b .*8×1.*uint8",
        ),
        (holding(Params4bit(torch.zeros(4, 4))), "Params4bit"),
        (holding(nn.Parameter(torch.zeros(2, 4, 4))), "2×4×4"),
        (holding(nn.Parameter(torch.zeros(4, 4).to(torch.float8_e4m3fn), requires_grad=False)), "float8"),
        (nn.Linear(4, 4, device="meta"), "not in memory"),
        (nn.ReLU(), "no parameter 'weight'"),
    ],
    ids=["packed", "class", "stacked", "float8", "offloaded", "none"],
)
def test_what_is_not_a_plain_matrix_is_refused(module: nn.Module, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        read_weight(module, SITE)


def test_a_wrong_shape_is_our_bug() -> None:
    with pytest.raises(ValueError, match=r"a\.b stores \(4, 6\)"):
        convert_to_stored(torch.zeros(6, 4), SITE, torch.zeros(4, 6))
