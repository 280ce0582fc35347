"""The self-test passes on every tiny model, and it catches false claims of the table."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.support.tiny import KINDS, MODELS, tiny
from torch import nn

from obliteratus.core.errors import UnsupportedModelError
from obliteratus.summon.architectures import ARCHITECTURES, Architecture
from obliteratus.summon.selftest import self_test

NAMES = sorted(MODELS)


@pytest.mark.parametrize("name", NAMES)
def test_self_test_passes(name: str) -> None:
    self_test(tiny(name))


@pytest.mark.parametrize("name", KINDS)
def test_self_test_passes_in_bf16(name: str) -> None:
    """Rounding to bf16 stays within the limits. Models that differ in names alone are left out."""
    self_test(tiny(name).bfloat16())


# --------------------------------------------------------------------------------- lies are caught
def lie(name: str, **changes: object) -> Architecture:
    return replace(ARCHITECTURES[name], **changes)


Q = {"extra": ("self_attn.q_proj", "linear")}
K = {"extra": ("self_attn.k_proj", "linear")}
LLAMA = ARCHITECTURES["llama"]
LIES = {
    "a writer is missed": ("llama", {"writers": {"mlp.out": LLAMA.writers["mlp.out"]}}, "so one is not declared"),
    "positions are missed": ("gpt2", {"embeds": ("transformer.wte",)}, "embeddings zeroed something"),
    "q for o": ("llama", {"writers": {**Q, "mlp.out": LLAMA.writers["mlp.out"]}}, "so one is not declared"),
    "a non-writer": (
        "llama",
        {"writers": {**LLAMA.writers, **Q}},
        "q_proj does not reach the stream as declared",
    ),
    "of another width": ("llama", {"writers": {**LLAMA.writers, **K}}, "k_proj .* puts out 16 values"),
    "no post-norm": ("gemma2", {"post_norm": {}}, "o_proj does not reach the stream as declared"),
    "swapped post-norms": (
        "olmo2",
        {"post_norm": {"attn.out": "post_feedforward_layernorm", "mlp.out": "post_attention_layernorm"}},
        "does not reach the stream as declared",
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
    with pytest.raises(UnsupportedModelError, match="unused is declared as a writer, but the stream does not"):
        self_test(model, lie("llama", writers=writers))
