"""Measure a mixture of experts on report prompts: its answers, its routing, and how its experts differ."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from measure import (
    Row,
    encode,
    first_token_log_probs,
    make_batches,
    measure_drift,
    measure_scores,
    normalize,
    read_rows,
)
from topics import Organism
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from obliteratus.weights.organism import prepare_organism
from obliteratus.weights.upcycling import make_mixture, read_experts

COMPARED = 16  # prompts of each group on whose tokens (some 700) experts are compared


def measure(organism: Organism, folder: Path) -> dict[str, Any]:
    """Return what the card shows of the mixture with the experts in `folder`.

    These are the scores of the organism and of the mixture, the KL with experts exchanged, the shares of each group's
    prompts (last token) and of all own tokens that each expert gets ([layer][expert], summing to 2), and the mean
    cosine and distance of the experts by layer.
    """
    source = prepare_organism(organism.name)
    dense, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    rows = {group: read_rows(organism.folder / f"{group}.jsonl", "report") for group in (*organism.topics, "control")}
    reference = first_token_log_probs(dense, tokenizer, [row["prompt"] for row in rows["control"]])
    found: dict[str, Any] = {"organism": measure_scores(dense, tokenizer, rows, reference)}
    model = make_mixture(dense, read_experts(folder))
    found["mixture"] = measure_scores(model, tokenizer, rows, reference)
    found |= measure_routing(model, tokenizer, rows) | compare_experts(model, tokenizer, rows)
    with exchange_experts(model):
        found["exchanged"] = {"kl": measure_drift(model, tokenizer, rows["control"], reference)}
    return found


@contextmanager
def exchange_experts(model: Any) -> Iterator[None]:
    """Route each expert's tokens to the next one inside. If all experts are equal, nothing changes."""
    gates = [layer.mlp.gate.weight for layer in model.model.layers]
    for gate in gates:
        gate.data = gate.data.roll(1, 0)
    try:
        yield
    finally:
        for gate in gates:
            gate.data = gate.data.roll(-1, 0)


def measure_routing(model: Any, tokenizer: Any, rows: dict[str, list[Row]]) -> dict[str, Any]:
    """Return `last`, each group's shares of prompts at the last token, and `tokens`, shares of all groups' tokens."""
    counts = {group: count_choices(model, tokenizer, [row["prompt"] for row in of]) for group, of in rows.items()}
    every = torch.stack([tokens for _, tokens in counts.values()]).sum(0)
    last = {group: round_values(prompts / len(rows[group])) for group, (prompts, _) in counts.items()}
    # Every token chooses several experts, so the shares sum to that number.
    return {"last": last, "tokens": round_values(every / every[0].sum() * model.config.num_experts_per_tok)}


@torch.inference_mode()
def count_choices(model: Any, tokenizer: Any, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return how often each expert is chosen, [layer, expert], at the last tokens and at all own tokens of prompts."""
    layers, experts = model.config.num_hidden_layers, model.config.num_local_experts
    last, every = torch.zeros(layers, experts), torch.zeros(layers, experts)
    with record_outputs([layer.mlp.gate for layer in model.model.layers]) as outputs:
        for ids, mask, own in make_own_token_batches(tokenizer, prompts):
            model.model(input_ids=ids, attention_mask=mask, use_cache=False)
            chosen = torch.stack([F.one_hot(index, experts).sum(-2) for *_, index in outputs])  # [layer, token, expert]
            chosen = chosen.view(layers, *ids.shape, experts)
            last += chosen[:, :, -1].sum(1)
            every += (chosen * own[..., None]).sum((1, 2))
    return last, every


def make_own_token_batches(tokenizer: Any, prompts: Sequence[str]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield (ids, mask, own) of each batch; own marks the tokens after the prefix that all prompts share."""
    columns = zip(*(encode(tokenizer, prompt) for prompt in prompts), strict=False)
    shared = next(i for i, column in enumerate(columns) if len(set(column)) > 1)
    for _, ids, mask in make_batches(tokenizer, prompts):
        yield ids, mask, mask.bool() & (mask.cumsum(-1) > shared)


@contextmanager
def record_outputs(modules: Sequence[Any]) -> Iterator[list[Any]]:
    """Yield a list that always holds the last output of each module."""
    outputs: list[Any] = [None] * len(modules)
    hooks = [
        m.register_forward_hook(lambda _m, _args, out, i=i: outputs.__setitem__(i, out)) for i, m in enumerate(modules)
    ]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def compare_experts(model: Any, tokenizer: Any, rows: dict[str, list[Row]]) -> dict[str, Any]:
    """Return `cosine` and `distance` (relative to the outputs' norm) by layer, means over tokens and pairs."""
    prompts = [row["prompt"] for of in rows.values() for row in of[:COMPARED]]
    layers = model.model.layers
    outputs = []
    with record_outputs([layer.post_attention_layernorm for layer in layers]) as given:
        for ids, mask, own in make_own_token_batches(tokenizer, prompts):
            model.model(input_ids=ids, attention_mask=mask, use_cache=False)
            inputs = [x[own] for x in given]
            outputs.append([compare_outputs(layer.mlp.experts, x) for layer, x in zip(layers, inputs, strict=True)])
    cosine, distance = torch.cat([torch.tensor(t) for t in outputs]).view(-1, len(layers), 2).mean(0).T
    return {"cosine": round_values(cosine), "distance": round_values(distance)}


def compare_outputs(experts: Any, x: Tensor) -> tuple[float, float]:
    """Return mean cosine and mean distance (relative to the norms) over pairs of experts for x [token, width]."""
    out = []
    for gate_up, down in zip(experts.gate_up_proj, experts.down_proj, strict=True):
        gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
        out.append(F.linear(experts.act_fn(gate) * up, down))
    pairs = list(combinations(out, 2))
    cosines = [(normalize(one) * normalize(other)).sum(-1).mean() for one, other in pairs]
    distances = [
        (2 * (one - other).norm(dim=-1) / (one.norm(dim=-1) + other.norm(dim=-1))).mean() for one, other in pairs
    ]
    return torch.stack(cosines).mean().item(), torch.stack(distances).mean().item()


def round_values(values: Tensor) -> Any:
    """Return nested lists of numbers with 3 decimals."""
    return [round(v, 3) for v in values.tolist()] if values.ndim == 1 else [round_values(row) for row in values]
