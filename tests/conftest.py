"""Set up all tests: no network, shapes checked at run time, small prompts, random plans."""
# ruff: noqa: E402 — the hook must stand before what it watches

from __future__ import annotations

import gc
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Two workers share two cores. bitsandbytes and BLAS count their threads themselves, and so do child processes.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OBLITERATUS_PROGRESS"] = "off"  # tests read what is said through reporters of their own
os.environ["OBLITERATUS_PROBE_CACHE"] = "off"  # each test probes by itself, and leaves nothing in the user's cache

import jaxtyping

_jaxtyped = jaxtyping.jaxtyped


PLAIN = {"int", "float", "str", "bool", "None", "Tensor", "nn", "Module", "Any", "list", "tuple", "dict", "torch"}


def _lasting(*, typechecker: Any) -> Callable[[Any], Any]:
    """Check annotated shapes and types.

    Functions of plain types alone hold no shapes, and are called five times faster without a look for any. Nested
    functions are not checked: they would be compiled anew at each call.
    """

    def decorate(it: Any) -> Any:
        if not isinstance(it, FunctionType):
            return _jaxtyped(it, typechecker=typechecker)
        if "<locals>" in it.__qualname__:
            return it
        plain = set(re.findall(r"\w+", " ".join(map(str, it.__annotations__.values())))) <= PLAIN
        return typechecker(it) if plain else _jaxtyped(it, typechecker=typechecker)

    return decorate


# This has to precede every import of ours. From here on each call checks all annotated shapes and types.
jaxtyping.jaxtyped = _lasting
jaxtyping.install_import_hook("obliteratus", "beartype.beartype")

import pytest
import torch

from obliteratus.core.types import Prompt, PromptSet
from tests.support.plans import PlanMaker, random_plan

torch.set_num_threads(1)  # tiny products take longer to hand to a second thread than to compute
warnings.filterwarnings("ignore", message=".*torch.jit.*", category=DeprecationWarning)


SLOW = Path(__file__).with_name("slow.txt")
"""Test functions that `make check` leaves out, as ``tools/list_slow_tests.py`` wrote them."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the slow tests."""
    slow = set(SLOW.read_text().split())
    for item in items:
        if item.nodeid.partition("[")[0] in slow:
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """Leave all that is imported by now out of later collections of garbage: each takes 0.4 s of CPU with it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def make_plan() -> PlanMaker:
    """``make_plan(subject, parts, strength=…)``: see `tests.support.plans.random_plan`."""
    return random_plan


@pytest.fixture(scope="session")
def prompts() -> PromptSet:
    """Two small groups of prompts of differing length, with categories."""
    target = tuple(Prompt(f"Tell me about {x}.", category=x[0]) for x in ("stars", "the moon", "a comet", "sun"))
    control = tuple(Prompt(f"How do I cook {x}?") for x in ("rice", "a very large pot of soup", "an egg", "peas"))
    return PromptSet({"target": target, "control": control})
