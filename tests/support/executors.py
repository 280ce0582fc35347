"""Every way in which a plan can be carried out on a tiny model, and what tests of them share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from tests.support.plans import random_basis
from tests.support.tiny import MODELS, tiny_config, tiny_subject
from torch import Tensor, nn

from obliteratus.core.settings import Excise
from obliteratus.core.types import Activations, Directions, Mask, Plan, Subject
from obliteratus.excise.bake.adapter import save_adapter
from obliteratus.excise.bake.tensors import bake
from obliteratus.excise.live.hooks import applied
from obliteratus.excise.plan import plan_edits
from obliteratus.inference.hidden_states import read_hidden_states
from obliteratus.rebirth.save import WRITERS as FORMS
from obliteratus.summon.load import open_subject
from obliteratus.summon.sites import find_architecture, is_tied

NAMES = sorted(MODELS)
WRITERS = ("attn.out", "mlp.out")
RULES = ["none", "columns", "rows", "unit_rows", "unit_rows_rank_3", "whole"]
EXACT = ["none", "columns", "whole"]  # the rules that keep Q W′ = 0
IDS = torch.randint(0, 256, (3, 20), generator=torch.Generator().manual_seed(1))
CLOSE = {"rtol": 1e-4, "atol": 1e-4}

# Models by what their writers' biases can do, and by what an adapter can hold. test_executors.py compares these with
# the models themselves, so that none need be built before a test wants it.
BIASED = ["gpt2", "gpt_neox", "gpt_neox_sequential", "gpt_oss", "llama_biased", "opt"]
SWITCHED = [n for n in NAMES if n not in BIASED and find_architecture(tiny_config(n)).bias_switch]
SWITCHLESS = [n for n in NAMES if n not in BIASED and n not in SWITCHED]
NO_ADAPTER = ["falcon_h1", "nemotron_h", "nemotron_h_latent"]
STACKED = [
    *("deepseek_v2", "deepseek_v3", "glm4_moe", "gpt_oss", "granitemoe", "granitemoehybrid", "jamba", "lfm2_moe"),
    *("mixtral", "nemotron_h", "olmoe", "qwen2_moe", "qwen3_5_moe_text", "qwen3_moe"),
    "qwen3_next",
]


@cache
def opened(name: str) -> Subject:
    """The tiny model of this name. All tests share it: leave it as it was."""
    return tiny_subject(name)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(IDS).logits


@cache
def unedited(name: str) -> Tensor:
    """Logits of `opened(name)` as it is."""
    return logits(opened(name).model)


def live(subject: Subject, plan: Plan) -> Tensor:
    with applied(subject, plan):
        return logits(subject.model)


# ------------------------------------------------------------------------------------ the other executors
def by_baking(subject: Subject, plan: Plan, folder: Path) -> Tensor:
    model = copy.deepcopy(subject.model)
    new = bake(subject, plan)
    if is_tied(model):
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone(), requires_grad=False)
    for name, value in new.items():
        path, _, key = name.rpartition(".")
        setattr(model.get_submodule(path), key, nn.Parameter(value(), requires_grad=False))
    return logits(model)


def by_adapter(subject: Subject, plan: Plan, folder: Path) -> Tensor:
    save_adapter(subject, plan, folder, max_rank=None)
    return logits(PeftModel.from_pretrained(copy.deepcopy(subject.model), folder))


def by_saving(subject: Subject, plan: Plan, folder: Path) -> Tensor:
    FORMS["merged"](subject, plan, folder)
    subject.tokenizer.save_pretrained(folder)
    return logits(open_subject(folder, device="cpu").model)


EXECUTORS: dict[str, Callable[[Subject, Plan, Path], Tensor]] = {
    "baked": by_baking,
    "adapter": by_adapter,
    "reloaded": by_saving,
}


def has_adapter(name: str) -> bool:
    """Whether PEFT can hold an adapter of this model: it holds no stack of experts."""
    return name not in STACKED and name not in NO_ADAPTER


def executors(names: Iterable[str]) -> list[tuple[str, str]]:
    """Names of models with each executor that they have."""
    return [(n, e) for n in names for e in EXECUTORS if e != "adapter" or has_adapter(n)]


# ------------------------------------------------------------------------------------------------ plans
def directed(subject: Subject, seed: int = 0, k: int = 2, same: bool = False) -> Directions:
    """Random directions for each stream, or the same for all."""
    rows = [random_basis(subject.width, k, seed if same else seed + i) for i in range(subject.n_layers + 1)]
    one = torch.ones(subject.n_layers + 1)
    return Directions(torch.stack(rows), one, one, "")


def planned(subject: Subject, directions: Directions, **options: Any) -> Plan:
    acts = Activations({}, -1)
    return plan_edits(subject, directions, torch.ones(len(subject.sites)), acts, Excise(**options))


def silenced(subject: Subject, neurons: tuple[int, ...] = (1, 5, 30)) -> Plan:
    """Masks of these neurons in every MLP."""
    masks = tuple(Mask(s, torch.tensor(neurons)) for s in subject.sites if s.part == "mlp.out")
    return Plan(masks, subject.source.digest)


def streams(subject: Subject, plan: Plan) -> Tensor:
    """Every prompt's stream at its last token under the plan: [prompts, streams, width]."""
    with applied(subject, plan):
        return torch.cat([r.stream for r in read_hidden_states(subject, [row.tolist() for row in IDS], reuse=False)])
