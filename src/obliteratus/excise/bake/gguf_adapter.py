"""Plans as adapters that llama.cpp and Ollama load beside a model: low-rank matrices, and control vectors.

Formats: llama.cpp's convert_lora_to_gguf.py and common_control_vector_load.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from obliteratus.core.errors import UnsupportedModelError, UserError
from obliteratus.core.types import Change, Edit, Plan, Shift, Site, Subject
from obliteratus.excise.bake.adapter import MAX_RANK, Factors, factorize_matrix
from obliteratus.excise.bake.gguf_names import TABLE, GgufModel, find_name
from obliteratus.excise.change import needs_bias
from obliteratus.weights.gguf_blocks import decode
from obliteratus.weights.matrices import has_bias, read_weight

# GGUF architectures by transformers' model_type. Where a converter permutes the rows of queries and keys, so must an
# adapter that is made from other files (llama.cpp's conversion/llama.py).
ARCHITECTURES: Mapping[str, str] = {
    **dict.fromkeys(("llama", "mistral", "mixtral"), "llama"),
    **{name: name for name in ("qwen2", "qwen3", "phi3", "gemma", "gemma2", "smollm3", "olmo2", "gpt2")},
    "gemma3_text": "gemma3",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "gpt_neox": "gptneox",
}
PERMUTED = ("llama", "mistral", "mixtral", "smollm3")
UNPERMUTED = ("qwen2", "qwen3", "phi3", "gemma", "gemma2", "gemma3_text", "qwen2_moe", "qwen3_moe")


def choose_architecture(subject: Subject) -> str:
    """Return the name of llama.cpp's graph for a model. Raises UnsupportedModelError if it is not known here."""
    name = subject.model.config.model_type
    if name not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"--save lora-gguf and control-vector know no llama.cpp graph for '{name}' models; apply the plan to a "
            "GGUF file of the model instead: obliteratus apply PLAN model.gguf"
        )
    return ARCHITECTURES[name]


# ---------------------------------------------------------------------------------- low-rank adapters
def save_lora_for_file(model: GgufModel, plan: Plan, path: Path) -> dict[str, float]:
    """Write the plan as a LoRA file for the weights of a GGUF file, exact on them as they are quantized there.

    Returns ``rank`` and ``error``, the largest ‖ΔW − BA‖ / ‖ΔW‖. Raises UserError for a plan that it cannot hold.
    """
    _check_holds(plan, lambda site: model.find_bias(site) in model.file.tensors, model.tied)
    factors, errors = dict[str, Factors](), [0.0]
    for changes in plan.by_site().values():
        for tensor in model.find_tensors(changes[0].site):
            weight = decode(model.file.read_rows(tensor), tensor.type)
            weight = weight.T if changes[0].site.layout == "embedding" else weight
            factors[tensor.name], error = factorize_matrix(weight, changes, MAX_RANK)
            errors.append(error)
    return _write_lora(model.file.architecture, factors, errors, path)


def save_lora_for_subject(subject: Subject, plan: Plan, path: Path) -> dict[str, float]:
    """Write the plan as a LoRA file for any GGUF file of the subject. Returns and raises as `save_lora_for_file`."""
    architecture = choose_architecture(subject)
    tied = bool(subject.model.config.get_text_config().tie_word_embeddings)
    _check_holds(plan, lambda site: has_bias(subject.module(site.path), site), tied)
    factors, errors = dict[str, Factors](), [0.0]
    for changes in plan.by_site().values():
        site = changes[0].site
        name = find_name(architecture, subject.n_layers, site)
        (b, a), error = factorize_matrix(read_weight(subject.module(site.path), site), changes, MAX_RANK)
        factors[f"{name}.weight"] = _permute_rows(subject, site, b), a
        errors.append(error)
    return _write_lora(architecture, factors, errors, path)


def _permute_rows(subject: Subject, site: Site, b: Tensor) -> Tensor:
    """Return the factor of a query or key matrix with its rows in the order that llama.cpp's rotary embedding wants."""
    heads = count_permuted_heads(subject, site)
    return permute_heads(b, heads) if heads else b


def count_permuted_heads(subject: Subject, site: Site) -> int:
    """Return the heads of a query or key matrix whose rows GGUF files have in another order; 0 for any other matrix."""
    kind, config = subject.model.config.model_type, subject.model.config.get_text_config()
    if site.part != "attn.in" or kind in UNPERMUTED:
        return 0
    if kind not in PERMUTED:
        raise UnsupportedModelError(
            f"--save lora-gguf does not know the order of {site.path}'s outputs in '{kind}' GGUF files; take attn.in "
            "out of excise.parts"
        )
    heads: dict[str, int] = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    return heads.get(site.path.rpartition(".")[2], 0)


def permute_heads(rows: Tensor, heads: int) -> Tensor:
    """Return the rows of a query or key matrix with both halves of each head interleaved, as llama.cpp has them."""
    return rows.view(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _check_holds(plan: Plan, biased: Callable[[Site], bool], tied: bool) -> None:
    """Raise UserError for what a LoRA file of llama.cpp has no place for."""
    for change in plan.edits:
        site = change.site
        if site.stacked:
            raise UserError(f"--save lora-gguf: {site.parameter} holds all experts; bake the plan with --save gguf")
        if site.layout == "embedding" and tied:
            raise UserError(
                "--save lora-gguf: llama.cpp applies an adapter of a tied embedding to the head as well; take embed "
                "out of excise.parts, or use --save gguf"
            )
        if needs_bias(change) or (site.role == "writes" and biased(site)):
            what = "steering" if isinstance(change, Shift) else "an anchored edit" if needs_bias(change) else "an edit"
            option = "steer=0" if isinstance(change, Shift) else "anchored=false"
            remedy = (
                f"make the plan with --set excise.{option}, or use --save gguf"
                if needs_bias(change)
                else "use --save gguf"
            )
            raise UserError(
                f"--save lora-gguf: {what} changes the bias of {site.path}, which llama.cpp's LoRA files have no place "
                f"for; {remedy}"
            )


def _write_lora(
    architecture: str, factors: Mapping[str, Factors], errors: Sequence[float], path: Path
) -> dict[str, float]:
    rank = max(a.shape[0] for _, a in factors.values())
    tensors: dict[str, Tensor] = {}
    for name, (b, a) in factors.items():
        b, a = (
            torch.nn.functional.pad(b, (0, rank - b.shape[1])),
            torch.nn.functional.pad(a, (0, 0, 0, rank - len(a))),
        )
        tensors[f"{name}.lora_a"] = a.T if name == TABLE else a  # llama.cpp looks tokens up in it
        tensors[f"{name}.lora_b"] = b
    entries = {gguf.Keys.Adapter.TYPE: "lora", gguf.Keys.Adapter.LORA_ALPHA: float(rank)}  # divided by the rank: one
    _write_adapter(path, architecture, gguf.GGUFType.ADAPTER, entries, tensors)
    return {"rank": float(rank), "error": max(errors)}


def _write_adapter(
    path: Path, architecture: str, kind: str, entries: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write a small GGUF file of fp32 tensors; it appears whole or not at all."""
    aside = path.with_name(path.name + ".new")
    writer = gguf.GGUFWriter(aside, architecture)
    adders: dict[type, Callable[[str, Any], None]] = {
        str: writer.add_string,
        float: writer.add_float32,
        int: writer.add_int32,
    }
    try:
        writer.add_type(kind)
        for key, value in entries.items():
            adders[type(value)](key, value)
        for name, tensor in tensors.items():
            writer.add_tensor(name, np.ascontiguousarray(tensor.float().cpu().numpy()))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------ control vectors
def save_control_vector(architecture: str, n_layers: int, plan: Plan, path: Path) -> dict[str, float]:
    """Write a plan that only steers as a control vector: what it adds to the stream behind each layer.

    Edits of strength 0 do nothing and are left out. Returns ``layers``, how many get a vector. Raises UserError for a
    plan that does anything else, or that steers where llama.cpp adds nothing.
    """
    vectors: dict[str, Tensor] = {}
    for change in plan.edits:
        if isinstance(change, Edit) and change.strength == 0:
            continue
        vector, layer = _check_steers(change).vector, change.site.layer
        name = f"direction.{layer}"
        vectors[name] = vector + vectors.get(name, torch.zeros_like(vector))
    if not vectors:
        raise UserError("--save control-vector: the plan adds nothing to the stream; set excise.steer in the recipe")
    entries = {"controlvector.model_hint": architecture, "controlvector.layer_count": n_layers}
    _write_adapter(path, "controlvector", "control_vector", entries, vectors)
    return {"layers": float(len(vectors))}


def _check_steers(change: Change) -> Shift:
    site = change.site
    if not isinstance(change, Shift):
        raise UserError(
            f"--save control-vector: the plan edits {site.path}, and a control vector only adds to the stream; "
            "make a plan that only steers (--set excise.strength=0 --set excise.steer=1), or use --save gguf"
        )
    if site.part != "mlp.out" or site.layer < 1:
        raise UserError(
            f"--save control-vector: the plan steers at {site.path}, and llama.cpp adds control vectors only behind "
            "layers 1 and up; use --save gguf"
        )
    return change
