"""What all tests share: no network, shapes checked at run time, small prompts, random plans."""
# ruff: noqa: E402 — the hook must stand before what it watches

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["OBLITERATUS_PROBE_CACHE"] = "off"  # each test probes by itself, and leaves nothing in the user's cache

import jaxtyping

_jaxtyped = jaxtyping.jaxtyped


def _lasting(*, typechecker: Any) -> Callable[[Any], Any]:
    """jaxtyped, except on nested functions: they are made, and would be compiled, anew at each call."""

    def decorate(it: Any) -> Any:
        nested = isinstance(it, FunctionType) and "<locals>" in it.__qualname__
        return it if nested else _jaxtyped(it, typechecker=typechecker)

    return decorate


# Before anything of ours is imported: from here on every annotated shape and type is checked at each call.
jaxtyping.jaxtyped = _lasting
jaxtyping.install_import_hook("obliteratus", "beartype.beartype")

import pytest
import torch

from obliteratus.core.settings import expand_part
from obliteratus.core.types import Edit, NormRule, Plan, Prompt, PromptSet, Site, Subject

torch.set_num_threads(1)  # tiny products take longer to hand to a second thread than to compute
warnings.filterwarnings("ignore", message=".*torch.jit.*", category=DeprecationWarning)


def pytest_collection_finish() -> None:
    """Leave all that is imported by now out of later collections of garbage: each takes 0.4 s of CPU with it."""
    gc.collect()
    gc.freeze()


PlanMaker = Callable[..., Plan]


def random_basis(width: int, k: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """k orthonormal rows."""
    noise = torch.randn(width, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(noise)[0].T.contiguous().to(dtype)


@pytest.fixture(scope="session")
def make_plan() -> PlanMaker:
    """``make_plan(subject, parts, strength=…)``: a random subspace at every site of the given parts."""

    def make(
        subject: Subject,
        parts: Sequence[str] = ("attn.out", "mlp.out"),
        *,
        strength: float = 1.0,
        norm: NormRule = "none",
        k: int = 2,
        seed: int = 0,
        anchored: bool = False,
    ) -> Plan:
        return Plan(tuple(_edits(subject, parts, strength, norm, k, seed, anchored)), subject.source.digest)

    return make


def _edits(
    subject: Subject, parts: Sequence[str], strength: float, norm: NormRule, k: int, seed: int, anchored: bool
) -> list[Edit]:
    sites: list[Site] = [s for s in subject.sites if s.part in {own for part in parts for own in expand_part(part)}]
    made = []
    for i, site in enumerate(sites):
        anchor = torch.randn(subject.width, generator=torch.Generator().manual_seed(seed + i)) if anchored else None
        made.append(Edit(site, random_basis(subject.width, k, 100 * seed + i), strength, norm, anchor))
    return made


@pytest.fixture(scope="session")
def prompts() -> PromptSet:
    """Two small groups of prompts of differing length, with categories."""
    target = tuple(Prompt(f"Tell me about {x}.", category=x[0]) for x in ("stars", "the moon", "a comet", "sun"))
    control = tuple(Prompt(f"How do I cook {x}?") for x in ("rice", "a very large pot of soup", "an egg", "peas"))
    return PromptSet({"target": target, "control": control})
