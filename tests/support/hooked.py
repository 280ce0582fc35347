"""Interventions written out with plain hooks, against which those of the package are checked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from obliteratus.core.types import PromptSet, Subject
from obliteratus.inference.chat_template import render_prompts


def ids_of(subject: Subject, prompts: PromptSet) -> dict[str, list[list[int]]]:
    """Token ids of the target and control prompts."""
    return {g: render_prompts(subject, prompts[g]) for g in ("target", "control")}


@contextmanager
def hooked(pairs: list[tuple[Any, Any]]) -> Iterator[None]:
    """Inside, each module has its forward hook."""
    handles = [module.register_forward_hook(hook) for module, hook in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def without(model: Any, vector: Tensor) -> Any:
    """Hooks that take the vector out of whatever a Llama's writers write."""
    d = vector.double() / vector.double().norm()
    layers = model.model.layers
    writers = [model.model.embed_tokens, *(x.self_attn.o_proj for x in layers), *(x.mlp.down_proj for x in layers)]
    return hooked([(w, lambda m, a, y: y - (y @ d)[..., None] * d) for w in writers])
