"""Measure a mixture of experts on report prompts: what it says, whom it asks, and how its experts differ."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from measure import Row, batches, drift, encode, first_logprobs, read, scores, unit
from topics import Organism
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from obliteratus.weights.organism import organism_folder
from obliteratus.weights.upcycling import make_mixture, read_experts

COMPARED = 16  # prompts of each group on whose tokens, some 700, experts are compared


def measure(organism: Organism, folder: Path) -> dict[str, Any]:
    """Scores of the organism and of its mixture with the experts in `folder`, KL of that with experts exchanged; shares
    of each group's prompts (last token) and of all own tokens that each expert gets, [layer][expert], which sum to 2;
    and by layer the experts' mean cosine and distance."""
    source = organism_folder(organism.name)
    dense, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    rows = {group: read(organism.folder / f"{group}.jsonl", "report") for group in (*organism.topics, "control")}
    reference = first_logprobs(dense, tokenizer, [row["prompt"] for row in rows["control"]])
    found: dict[str, Any] = {"organism": scores(dense, tokenizer, rows, reference)}
    model = make_mixture(dense, read_experts(folder))
    found["mixture"] = scores(model, tokenizer, rows, reference)
    found |= routing(model, tokenizer, rows) | differences(model, tokenizer, rows)
    with exchanged(model):
        found["exchanged"] = {"kl": drift(model, tokenizer, rows["control"], reference)}
    return found


@contextmanager
def exchanged(model: Any) -> Iterator[None]:
    """Every expert gets the tokens of the one before it: where experts are the same, nothing changes."""
    gates = [layer.mlp.gate.weight for layer in model.model.layers]
    for gate in gates:
        gate.data = gate.data.roll(1, 0)
    try:
        yield
    finally:
        for gate in gates:
            gate.data = gate.data.roll(-1, 0)


def routing(model: Any, tokenizer: Any, rows: dict[str, list[Row]]) -> dict[str, Any]:
    """`last`: by group, shares of prompts at the last token; `tokens`: shares of all groups' tokens."""
    counts = {group: routed(model, tokenizer, [row["prompt"] for row in of]) for group, of in rows.items()}
    every = torch.stack([tokens for _, tokens in counts.values()]).sum(0)
    last = {group: rounded(prompts / len(rows[group])) for group, (prompts, _) in counts.items()}
    # Each token has as many choices as a gate makes: shares of all tokens sum to that number too.
    return {"last": last, "tokens": rounded(every / every[0].sum() * model.config.num_experts_per_tok)}


@torch.inference_mode()
def routed(model: Any, tokenizer: Any, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """How often each expert is chosen, [layer, expert]: at the prompts' last tokens, and at all their own tokens."""
    layers, experts = model.config.num_hidden_layers, model.config.num_local_experts
    last, every = torch.zeros(layers, experts), torch.zeros(layers, experts)
    with outputs_of([layer.mlp.gate for layer in model.model.layers]) as told:
        for ids, mask, own in own_tokens(tokenizer, prompts):
            model.model(input_ids=ids, attention_mask=mask, use_cache=False)
            chosen = torch.stack([F.one_hot(index, experts).sum(-2) for *_, index in told])  # [layer, token, expert]
            chosen = chosen.view(layers, *ids.shape, experts)
            last += chosen[:, :, -1].sum(1)
            every += (chosen * own[..., None]).sum((1, 2))
    return last, every


def own_tokens(tokenizer: Any, prompts: Sequence[str]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(ids, mask, own) of each batch: own are the tokens after the beginning that the template gives all prompts."""
    columns = zip(*(encode(tokenizer, prompt) for prompt in prompts), strict=False)
    shared = next(i for i, column in enumerate(columns) if len(set(column)) > 1)
    for _, ids, mask in batches(tokenizer, prompts):
        yield ids, mask, mask.bool() & (mask.cumsum(-1) > shared)


@contextmanager
def outputs_of(modules: Sequence[Any]) -> Iterator[list[Any]]:
    """The last output of each module, in a list that every call fills anew."""
    told: list[Any] = [None] * len(modules)
    hooks = [
        m.register_forward_hook(lambda _m, _args, out, i=i: told.__setitem__(i, out)) for i, m in enumerate(modules)
    ]
    try:
        yield told
    finally:
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def differences(model: Any, tokenizer: Any, rows: dict[str, list[Row]]) -> dict[str, Any]:
    """`cosine` and `distance` (a share of the outputs' norm) by layer, means over tokens and pairs of experts."""
    prompts = [row["prompt"] for of in rows.values() for row in of[:COMPARED]]
    layers = model.model.layers
    told = []
    with outputs_of([layer.post_attention_layernorm for layer in layers]) as given:
        for ids, mask, own in own_tokens(tokenizer, prompts):
            model.model(input_ids=ids, attention_mask=mask, use_cache=False)
            inputs = [x[own] for x in given]
            told.append([compared(layer.mlp.experts, x) for layer, x in zip(layers, inputs, strict=True)])
    cosine, distance = torch.cat([torch.tensor(t) for t in told]).view(-1, len(layers), 2).mean(0).T
    return {"cosine": rounded(cosine), "distance": rounded(distance)}


def compared(experts: Any, x: Tensor) -> tuple[float, float]:
    """(mean cosine, mean distance as a share of the two norms' mean) over pairs of experts, on x [token, width]."""
    out = []
    for gate_up, down in zip(experts.gate_up_proj, experts.down_proj, strict=True):
        gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
        out.append(F.linear(experts.act_fn(gate) * up, down))
    pairs = list(combinations(out, 2))
    cosines = [(unit(one) * unit(other)).sum(-1).mean() for one, other in pairs]
    distances = [
        (2 * (one - other).norm(dim=-1) / (one.norm(dim=-1) + other.norm(dim=-1))).mean() for one, other in pairs
    ]
    return torch.stack(cosines).mean().item(), torch.stack(distances).mean().item()


def rounded(values: Tensor) -> Any:
    """Nested lists of 3 decimals."""
    return [round(v, 3) for v in values.tolist()] if values.ndim == 1 else [rounded(row) for row in values]
