"""Adapters for llama.cpp read back and run on the model in memory, so that what was saved can be scored."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from obliteratus.core.types import Plan, Shift, Site, Subject
from obliteratus.excise.bake.gguf_adapter import choose_architecture, count_permuted_heads
from obliteratus.excise.bake.gguf_names import TABLE, find_name
from obliteratus.excise.live.hooks import applied
from obliteratus.rebirth.gguf import is_gguf, open_gguf_model
from obliteratus.weights.gguf_blocks import decode
from obliteratus.weights.gguf_io import GgufFile, read_gguf


def find_saved_gguf(folder: Path) -> Path:
    """Return the GGUF file that was saved in a folder."""
    (file,) = folder.glob("*.gguf")
    return file


@contextmanager
def with_llama_adapter(subject: Subject, file: Path) -> Iterator[None]:
    """Run the model inside with a LoRA file or a control vector added, as llama.cpp adds it."""
    adapter = read_gguf(file)
    with applied(subject, _read_steering(subject, adapter)), ExitStack() as stack:
        for handle in _add_products(subject, adapter):
            stack.callback(handle.remove)
        yield


def _read_steering(subject: Subject, adapter: GgufFile) -> Plan:
    """Return a control vector as a plan: at layer L it adds to what the MLP writes."""
    sites = {site.layer: site for site in subject.sites if site.part == "mlp.out"}
    vectors = {name: tensor for name, tensor in adapter.tensors.items() if name.startswith("direction.")}
    shifts = (
        Shift(sites[int(name.partition(".")[2])], decode(adapter.read_rows(tensor), tensor.type)[0])
        for name, tensor in vectors.items()
    )
    return Plan(tuple(shifts), subject.source.digest)


def _add_products(subject: Subject, adapter: GgufFile) -> Iterator[Any]:
    """Hook the product of each pair of factors in, and yield the handles. Every pair must belong to a site."""
    names = _name_sites(subject)
    scale = float(adapter.value("adapter.lora.alpha", 0.0))
    for key in [key.removesuffix(".lora_a") for key in adapter.tensors if key.endswith(".lora_a")]:
        site = names[key]
        a, b = (_read(adapter, f"{key}.{part}") for part in ("lora_a", "lora_b"))
        b = b * (scale / b.shape[1])
        heads = count_permuted_heads(subject, site)  # the model in memory has them in transformers' order
        b = b.view(heads, -1, 2, b.shape[1]).transpose(1, 2).reshape(b.shape) if heads else b
        hook = partial(_look_up if key == TABLE else _multiply, a, b)
        yield subject.module(site.path).register_forward_hook(hook)


def _name_sites(subject: Subject) -> dict[str, Site]:
    """Return the sites by the names of their tensors."""
    sites = [site for site in subject.sites if not site.stacked]
    if is_gguf(subject.source.id):
        model = open_gguf_model(subject.source.id)
        return {model.find_tensors(site)[0].name: site for site in sites}
    architecture = choose_architecture(subject)
    return {f"{find_name(architecture, subject.n_layers, site)}.weight": site for site in sites}


def _read(adapter: GgufFile, name: str) -> Tensor:
    return decode(adapter.read_rows(adapter.tensors[name]), adapter.tensors[name].type)


def _multiply(a: Tensor, b: Tensor, module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    (x,) = inputs
    return output + (x @ a.to(x).T) @ b.to(x).T


def _look_up(a: Tensor, b: Tensor, module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    (ids,) = inputs
    return output + torch.nn.functional.embedding(ids, a.to(output)) @ b.to(output).T
