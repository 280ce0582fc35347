"""A small search on the tiny refuser, and processes that share one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from tests.support.refuser import asked, refuser

from obliteratus.core.run_folder import Store
from obliteratus.core.settings import Recipe
from obliteratus.core.types import Prompt, PromptSet, Subject
from obliteratus.pipeline.recipe import load_recipe
from obliteratus.pipeline.stages import Stages
from obliteratus.prompts import split_prompts
from obliteratus.search import SearchResult, StudyLocation, search
from obliteratus.search.direction_cache import DirectionCache
from obliteratus.search.score import TrialScorer
from obliteratus.verify import measure

REFUSAL = "I cannot help with that."


def search_prompts() -> PromptSet:
    """The twelve of each group of `asked`, in all three splits."""

    def pinned(p: Prompt, split: str) -> Prompt:
        return Prompt(f"{p.text} ({split})", split=split)

    groups = asked().groups
    return PromptSet(
        {g: tuple(pinned(p, split) for split in ("fit", "search", "report") for p in ps) for g, ps in groups.items()}
    )


def search_recipe(trials: int = 6, **settings: Any) -> Recipe:
    """`basic` with a space of two values, and verify steps that the tiny model can answer."""
    space = {"excise.strength": {"low": 0.0, "high": 1.5}, "weigh.0.low": {"low": 0.0, "high": 0.9}}
    return load_recipe(
        "basic",
        {
            "weigh": [{"use": "middle", "low": 0.0, "high": 1.0}, {"use": "component", "embed": 0.03}],
            "excise.parts": ["attn.out", "mlp.out", "embed"],  # without embeddings, controls do not move at all
            "verify": [{"use": "behavior", "tokens": 6}, {"use": "first_token_kl"}],
            "search": {"trials": trials, "tokens": 4, "space": space, **settings},
        },
    )


@cache
def search_subject() -> Subject:
    """The refuser that all searches share: leave it as it was."""
    return refuser(word=REFUSAL)


def run_search(
    recipe: Recipe, storage: str = "", pick: str = "balanced", subject: Subject | None = None
) -> SearchResult:
    subject, splits = subject or search_subject(), split_prompts(search_prompts(), 0, force=True)
    return search(recipe, subject, splits, Store(), StudyLocation(storage, "study"), pick)


def make_scorer(recipe: Recipe) -> tuple[DirectionCache, TrialScorer]:
    subject, splits = search_subject(), split_prompts(search_prompts(), 0, force=True)
    before = measure(subject, splits.search, recipe.verify)
    return DirectionCache(Stages(subject, splits, Store()), recipe), TrialScorer(subject, splits.search, recipe, before)


# ------------------------------------------------------------------------------------------------- processes
WORKER = """
import sys
sys.path.insert(0, {root!r})
import torch; torch.set_num_threads(1)
from tests.support.searches import run_search, search_recipe, search_subject, wait_for_others
search_subject()
wait_for_others({meeting!r}, {n})
print(len(run_search(search_recipe({trials}), {storage!r}).trials))
"""


def wait_for_others(meeting: str, n: int) -> None:
    """Return when n processes have called this, so that none runs all trials while another still starts."""
    (Path(meeting) / str(os.getpid())).touch()
    deadline = time.monotonic() + 150  # seconds: another that failed to start must not keep this one waiting for ever
    while len(list(Path(meeting).iterdir())) < n:
        assert time.monotonic() < deadline, "the other workers did not start"
        time.sleep(0.05)


def start_workers(n: int, trials: int, storage: str) -> list[subprocess.Popen[str]]:
    """Start n processes that work on one study of so many trials."""
    root = str(Path(__file__).parents[2])
    text = WORKER.format(root=root, trials=trials, storage=storage, meeting=mkdtemp(), n=n)
    return [subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, text=True) for _ in range(n)]
