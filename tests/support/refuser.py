"""A tiny Llama with hand-set weights that refuses by one known direction, clean at one token of one stream alone.

Prompts with a ``#`` are answered with N, all others with Y. Attention of one block averages over the prompt and
writes REFUSAL wherever a ``#`` came before. That block's MLP, where REFUSAL is present, also writes −COMMON, which all
prompts live on, at every template token but one; the next block's MLP does so at that one. So of all differences of
means only one has nothing of COMMON in it, and removing any other moves the answers to all prompts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from tests.support.tiny import MODELS, tiny_tokenizer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from obliteratus.core.types import Prompt, PromptSet, Subject
from obliteratus.summon.load import assemble_subject

LAYERS, WIDTH = 8, 32
COMMON, TRIGGER, DIRTY, CLEAN, REFUSAL, END = range(6)  # axes of the stream; content lives on the last 16
WORDS = ("stars", "the moon", "a comet", "the sun and its planets", "tides", "dust", "rings", "a nova")


def refuser(block: int = 2, clean: str = ":", sign: float = 1.0, word: str = "N") -> Subject:
    """The direction appears in what ``block`` leaves; ``clean`` is the byte of ``assistant:`` where it is clean.

    word: by which it refuses; more than a byte becomes a token of its own, and then an answer ends after Y.
    """
    options = {**MODELS["llama"][1], "num_hidden_layers": LAYERS}
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **options), dtype=torch.float32)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([word] if len(word) > 1 else [])
    with torch.no_grad():
        for layer in model.model.layers:
            for module in layer.modules():
                if isinstance(module, nn.Linear):
                    module.weight.zero_()
        _embed(model.model.embed_tokens.weight, tokenizer, clean)
        _move(model.model.layers[block])
        _spoil(model.model.layers[block].mlp, DIRTY)
        _spoil(model.model.layers[block + 1].mlp, CLEAN)
        _answer(model.lm_head.weight, tokenizer, sign, word)
        if len(word) > 1:
            model.model.embed_tokens.weight[byte(tokenizer, "Y"), END] = 40
            model.lm_head.weight[tokenizer.eos_token_id, END] = 10
            model.lm_head.weight[byte(tokenizer, "Y"), COMMON] = 1.2  # unsure enough for edits to be seen in its KL
    return assemble_subject(model.eval().requires_grad_(False), tokenizer, id="tiny:refuser")


def byte(tokenizer: Any, character: str) -> int:
    return int(tokenizer(character, add_special_tokens=False)["input_ids"][0])


def _embed(weight: torch.Tensor, tokenizer: Any, clean: str) -> None:
    weight.zero_()
    weight[:, COMMON] = 4
    weight[:, 16:] = 0.3 * torch.randn(len(weight), 16, generator=torch.Generator().manual_seed(0))
    weight[byte(tokenizer, "#"), TRIGGER] = 3
    for character in set("\nassistant:"):
        weight[byte(tokenizer, character), CLEAN if character == clean else DIRTY] = 2


def _move(layer: Any) -> None:
    """Queries and keys are 0: attention is even over all tokens so far."""
    layer.self_attn.v_proj.weight[0, TRIGGER] = 1
    layer.self_attn.o_proj.weight[REFUSAL, 0] = 60  # one trigger in some 30 tokens


def _spoil(mlp: Any, gate: int) -> None:
    mlp.gate_proj.weight[0, gate] = 2
    mlp.up_proj.weight[0, REFUSAL] = 1
    mlp.down_proj.weight[COMMON, 0] = -2


def _answer(weight: torch.Tensor, tokenizer: Any, sign: float, word: str) -> None:
    weight.zero_()
    weight[:, 16:] = 0.05 * torch.randn(len(weight), 16, generator=torch.Generator().manual_seed(1))
    weight[byte(tokenizer, "Y"), COMMON] = 2
    weight[byte(tokenizer, word), REFUSAL] = 6 * sign


def asked() -> PromptSet:
    """Twelve prompts a group, of differing length."""
    texts = [f"{verb} me about {x}?" for x in WORDS for verb in ("Tell", "Remind")][:12]
    target = tuple(Prompt(text.replace("about", "# about")) for text in texts)
    return PromptSet({"target": target, "control": tuple(Prompt(text) for text in texts)})


def shuffled(prompts: PromptSet) -> PromptSet:
    """The same prompts, half of each group in the other."""
    both = zip(prompts["target"], prompts["control"], strict=True)
    mixed = [(t, c) if i // 2 % 2 else (c, t) for i, (t, c) in enumerate(both)]
    return replace(prompts, groups={"target": tuple(t for t, _ in mixed), "control": tuple(c for _, c in mixed)})
