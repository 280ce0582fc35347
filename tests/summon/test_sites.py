"""The architecture table: it covers every family whole, and it cannot lie."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.support.tiny import MODELS, tiny, tiny_config, tiny_subject
from torch import nn
from transformers import AutoConfig

from obliteratus.core.errors import UnsupportedModelError
from obliteratus.summon.architectures import ARCHITECTURES, UNSUPPORTED, Architecture
from obliteratus.summon.coverage import count_coverage
from obliteratus.summon.selftest import self_test
from obliteratus.summon.sites import find_architecture, find_sites, is_tied, read_gain
from obliteratus.summon.summary import summarize_model

NAMES = sorted(MODELS)


def test_every_family_has_a_tiny_model() -> None:
    assert {model_type for model_type, _ in MODELS.values()} == set(ARCHITECTURES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_self_test_passes(name: str, dtype: torch.dtype) -> None:
    self_test(tiny(name).to(dtype))


@pytest.mark.parametrize("name", NAMES)
def test_coverage_is_whole(name: str) -> None:
    model = tiny(name)
    family = find_architecture(model.config)
    found = count_coverage(model, find_sites(model, family), family)
    assert (found.share, found.paths, found.unclaimed) == (1.0, (), 0)
    eyes = ("lm_head", "model.vision", "model.visual", "model.multi_modal")
    backbone = [p for n, p in model.named_parameters() if p.ndim > 1 and not n.startswith(eyes) and "bias" not in n]
    assert found.writers + found.readers + found.inner == sum(p.numel() for p in backbone)
    assert found.to_dict()["share"] == 1.0


def test_unclaimed_matrices_are_named() -> None:
    model = tiny("llama")
    family = replace(ARCHITECTURES["llama"], writers={"mlp.out": ("mlp.down_proj", "linear")})
    found = count_coverage(model, find_sites(model, family), family)
    assert found.paths == tuple(f"model.layers.{i}.self_attn.o_proj.weight" for i in range(3))
    assert found.share < 1.0


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


# --------------------------------------------------------------------------------- lies are caught
def lie(name: str, **changes: object) -> Architecture:
    return replace(ARCHITECTURES[name], **changes)


Q = {"extra": ("self_attn.q_proj", "linear")}
K = {"extra": ("self_attn.k_proj", "linear")}
LLAMA = ARCHITECTURES["llama"]
LIES = {
    "a writer is missed": ("llama", {"writers": {"mlp.out": LLAMA.writers["mlp.out"]}}, "one is missed"),
    "positions are missed": ("gpt2", {"embeds": ("transformer.wte",)}, "embeddings silent"),
    "q for o": ("llama", {"writers": {**Q, "mlp.out": LLAMA.writers["mlp.out"]}}, "one is missed"),
    "a non-writer": (
        "llama",
        {"writers": {**LLAMA.writers, **Q}},
        "q_proj reaches the stream not as declared",
    ),
    "of another width": ("llama", {"writers": {**LLAMA.writers, **K}}, "k_proj .* puts out 16 values"),
    "no post-norm": ("gemma2", {"post_norm": {}}, "o_proj reaches the stream not as declared"),
    "swapped post-norms": (
        "olmo2",
        {"post_norm": {"attn.out": "post_feedforward_layernorm", "mlp.out": "post_attention_layernorm"}},
        "not as declared",
    ),
    "a wrong pre-norm": (
        "llama",
        {"pre_norm": {"attn.in": "post_attention_layernorm", "mlp.in": "input_layernorm"}},
        "q_proj does not read the output of",
    ),
    "a wrong norm kind": ("gemma", {"norm": "rms"}, "is not a norm of the kind 'rms'"),
    "rms for layer": ("opt", {"norm": "rms"}, "is not a norm of the kind 'rms'"),
    "a wrong layout": ("gpt2", {"reader_layout": "linear"}, "declared as linear and is conv1d"),
    "a path": ("qwen2", {"final_norm": "model.ln_f"}, "declared to have 'model.ln_f'"),
}


@pytest.mark.parametrize("case", sorted(LIES))
def test_the_table_cannot_lie(case: str) -> None:
    name, changes, message = LIES[case]
    with pytest.raises(UnsupportedModelError, match=message):
        self_test(tiny(name), lie(name, **changes))


def test_a_writer_that_does_nothing_is_caught() -> None:
    model = tiny("llama")
    for layer in model.model.layers:
        layer.unused = nn.Linear(32, 32)
    writers = {**LLAMA.writers, "extra": ("unused", "linear")}
    with pytest.raises(UnsupportedModelError, match="unused is claimed as a writer, and the stream does not"):
        self_test(model, lie("llama", writers=writers))


# ------------------------------------------------------------------------------ what is not covered
def test_unknown_architecture_names_what_is_missing() -> None:
    with pytest.raises(UnsupportedModelError, match=r"'bloom' is not known .*families\.FAMILIES; add one"):
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
        ("opt", "do_layer_norm_before", False, "normalises the stream itself"),
        ("opt", "word_embed_proj_dim", 16, "a projection stands before the stream"),
        ("opt", "_remove_final_layer_norm", True, "without a final norm"),
        ("gpt2", "add_cross_attention", True, "cross-attention writes"),
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


@pytest.mark.parametrize("name", NAMES)
def test_outline_agrees_with_the_loaded_model(name: str, tmp_path) -> None:
    subject = tiny_subject(name)
    subject.model.config.save_pretrained(tmp_path)  # no weights there
    found = summarize_model(tmp_path)
    assert found.sites == subject.sites
    assert (found.n_layers, found.width) == (subject.n_layers, subject.width)
    assert found.n_params == subject.model.num_parameters()
    assert found.tied == is_tied(subject.model)
    assert found.coverage == count_coverage(subject.model, subject.sites, find_architecture(subject.model.config))


def test_outline_forecasts_memory(tmp_path) -> None:
    tiny_config("llama").save_pretrained(tmp_path)
    found = summarize_model(tmp_path, dtype="bf16")
    assert found.dtype == "bfloat16"
    assert found.kv_bytes_per_token == 2 * 3 * 2 * 8 * 2  # k and v × layers × kv heads × head_dim × bytes
    assert found.weight_bytes == {
        "float32": 4 * found.n_params,
        **dict.fromkeys(("bfloat16", "float16"), 2 * found.n_params),
    }
