"""Sites are found in order with their norms, unknown architectures are refused, and ties are seen."""

from __future__ import annotations

import pytest
import torch
from tests.support.tiny import MODELS, tiny, tiny_config, tiny_subject
from transformers import AutoConfig

from obliteratus.core.errors import UnsupportedModelError
from obliteratus.summon.architectures import UNSUPPORTED
from obliteratus.summon.sites import find_architecture, find_sites, is_tied, read_gain

NAMES = sorted(MODELS)


def test_sites_in_order_with_their_streams() -> None:
    model = tiny("gemma2")
    sites = find_sites(model, find_architecture(model.config))
    assert [s.layer for s in sites] == sorted(s.layer for s in sites)
    assert (sites[0].part, sites[0].stream) == ("embed", 0)
    assert (sites[-1].part, sites[-1].role, sites[-1].stream) == ("unembed", "reads", 3)
    out = next(s for s in sites if s.layer == 1 and s.part == "mlp.out")
    assert (out.stream, out.gain) == (2, "model.layers.1.post_feedforward_layernorm")


def test_gain_is_what_multiplies() -> None:
    gemma, olmo, llama, opt = (tiny_subject(n) for n in ("gemma2", "olmo2", "llama", "opt"))
    for subject, added in ((gemma, 1.0), (olmo, 0.0)):
        site = next(s for s in subject.sites if s.part == "attn.out")
        norm = subject.model.model.layers[0].post_attention_layernorm
        assert torch.equal(read_gain(subject.model, site), added + norm.weight)
    assert read_gain(llama.model, next(s for s in llama.sites if s.part == "mlp.out")) is None
    assert read_gain(llama.model, next(s for s in llama.sites if s.part == "mlp.in")) is not None
    assert read_gain(opt.model, opt.sites[-1]).dtype == torch.float32


# ------------------------------------------------------------------------------ what is not covered
def test_unknown_architecture_names_what_is_missing() -> None:
    with pytest.raises(UnsupportedModelError, match=r"'bloom' is not known .*add an entry for it to summon"):
        find_architecture(AutoConfig.for_model("bloom"))
    with pytest.raises(UnsupportedModelError, match=r"'granite' is not known .*near: .*granitemoe"):
        find_architecture(AutoConfig.for_model("granite"))


@pytest.mark.parametrize("name", sorted(UNSUPPORTED))
def test_architectures_that_were_looked_at_say_why_not(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"'{name}' models are not supported: its blocks"):
        find_architecture(AutoConfig.for_model(name))


@pytest.mark.parametrize(
    ("name", "option", "value", "reason"),
    [
        ("opt", "do_layer_norm_before", False, "normalizes the stream itself"),
        ("opt", "word_embed_proj_dim", 16, "a projection stands before the stream"),
        ("opt", "_remove_final_layer_norm", True, "without a final norm"),
        ("gpt2", "add_cross_attention", True, "cross-attention also writes"),
    ],
)
def test_uncovered_configurations_say_why(name: str, option: str, value: object, reason: str) -> None:
    config = tiny_config(name)
    setattr(config, option, value)
    with pytest.raises(UnsupportedModelError, match=reason):
        find_architecture(config)


# --------------------------------------------------------------------------- tied, and without weights
@pytest.mark.parametrize("name", NAMES)
def test_tied_as_built(name: str) -> None:
    assert is_tied(tiny(name)) == MODELS[name][1]["tie_word_embeddings"]


def test_tied_by_storage_not_by_config() -> None:
    model = tiny("llama")
    model.config.tie_word_embeddings = True
    assert not is_tied(model)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = model.model.embed_tokens.weight
    assert is_tied(model)
