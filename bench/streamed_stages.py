"""One process of `bench.streaming`: probe, edit, verify and save a checkpoint, and record what each stage took.

Linux only.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from bench.common import peak_bytes
from obliteratus.causal import FitContext
from obliteratus.core.settings import Recipe
from obliteratus.core.types import Plan, PromptSet, Subject
from obliteratus.distill import find_directions
from obliteratus.excise.bake.base_checkpoint import BaseCheckpoint, find_base_checkpoint
from obliteratus.excise.bake.write_checkpoint import bake_into_checkpoint
from obliteratus.excise.live.hooks import applied
from obliteratus.excise.plan import plan_edits
from obliteratus.forecast.offloaded import SCORED, forecast_stages
from obliteratus.inference.chat_template import render_prompts
from obliteratus.inference.logits import first_token_log_probs
from obliteratus.inference.memory import memory_limit
from obliteratus.pipeline.offloaded import adapt_recipe
from obliteratus.pipeline.recipe import load_recipe
from obliteratus.probe.probe import collect_activations
from obliteratus.prompts import load_prompts, split_prompts
from obliteratus.summon.load import open_subject
from obliteratus.summon.load_offloaded import open_offloaded
from obliteratus.summon.sites import find_tied_ends
from obliteratus.summon.summary import summarize_model
from obliteratus.verify import measure_before_and_after
from obliteratus.verify.before_and_after import streamable_steps
from obliteratus.weigh import weigh_sites
from obliteratus.weights.side_files import copy_side_files


def limit_memory(limit: int) -> None:
    """Let the system refuse this process more bytes than that, including mapped files and code. 0 is no limit."""
    if limit:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="the checkpoint")
    parser.add_argument("out", type=Path, help="folder for the edited checkpoint")
    parser.add_argument("--limit", type=int, default=0, help="limit of the system in bytes; 0 for none")
    parser.add_argument("--memory", type=float, default=math.inf, help="budget of the program in bytes")
    parser.add_argument("--loaded", action="store_true", help="keep all weights in memory")
    parser.add_argument("--cold", action="store_true", help="drop the checkpoint from the file cache before each stage")
    parser.add_argument("--forecast", action="store_true", help="only print what `inspect --memory` expects")
    parser.add_argument("--prompts", type=int, default=96, help="prompts of each group")
    return parser.parse_args()


class Meter:
    """Records seconds, bytes read from disk, and peak memory by stage."""

    def __init__(self, folder: Path, cold: bool) -> None:
        self.folder, self.cold, self.stages = folder, cold, dict[str, dict[str, float]]()

    @contextmanager
    def stage(self, name: str, *folders: Path) -> Iterator[None]:
        """Record what the stage inside takes. folders: others to drop from the file cache beside the checkpoint's."""
        for folder in (self.folder, *folders) if self.cold else ():
            _drop_from_cache(folder)
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets the peak
        start, read = time.perf_counter(), _bytes_read()
        yield
        seconds = time.perf_counter() - start
        self.stages[name] = {"seconds": seconds, "read": _bytes_read() - read, "peak": peak_bytes()}
        print(name, self.stages[name], file=sys.stderr, flush=True)


def _drop_from_cache(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _bytes_read() -> int:
    """Return the bytes that this process has read from disk, not from the file cache."""
    counters = dict(line.split(": ") for line in Path("/proc/self/io").read_text(encoding="utf-8").splitlines())
    return int(counters["read_bytes"])


def run_process() -> None:
    """Run all stages, or forecast them, and print JSON."""
    options = parse_arguments()
    limit_memory(options.limit)
    logging.disable_progress_bar()
    meter = Meter(options.folder, options.cold)
    with memory_limit(options.memory):
        result = (forecast if options.forecast else run_stages)(meter, options)
    peak = max((stage["peak"] for stage in meter.stages.values()), default=0)
    print(json.dumps(result | {"stages": meter.stages, "peak": peak, "prompts": options.prompts}))


def take_fit_and_report(recipe: Recipe, prompts: int) -> tuple[PromptSet, PromptSet]:
    """Return the first prompts of each group to fit on, and to report on."""
    fit, _, report = split_prompts(load_prompts("organism:astronomy", "organism:astronomy"), recipe.seed)
    first = [PromptSet({g: members[:prompts] for g, members in part.groups.items()}) for part in (fit, report)]
    return first[0], first[1]


def forecast(meter: Meter, options: argparse.Namespace) -> dict[str, Any]:
    """Return the forecast of each stage. The file cache holds the checkpoint or not, as in the run."""
    recipe = load_recipe("two_directions")
    fit, report = take_fit_and_report(recipe, options.prompts)
    with meter.stage("FORECAST"):
        subject = open_offloaded(options.folder)
        adapted = adapt_recipe(subject, recipe)
        stages = forecast_stages(summarize_model(str(options.folder)), subject, adapted, fit, report)
    return {"expected": {name: stage._asdict() for name, stage in stages.items()}, "passes": adapted.passes}


def run_stages(meter: Meter, options: argparse.Namespace) -> dict[str, Any]:
    """Run all stages. The results of PROBE and DISTILL are written to OUT.pt."""
    recipe, result = load_recipe("two_directions"), dict[str, Any]()
    fit, report = take_fit_and_report(recipe, options.prompts)
    with meter.stage("SUMMON"):
        subject = (open_subject if options.loaded else open_offloaded)(options.folder)
    with meter.stage("PROBE"):
        acts = collect_activations(subject, fit, recipe.probe)
    with meter.stage("EXCISE"):
        directions = find_directions(acts, recipe.distill, FitContext(subject, fit))
        weights = weigh_sites(directions, subject.sites, acts, recipe.weigh)
        plan = plan_edits(subject, directions, weights, acts, recipe.excise)
    with meter.stage("VERIFY"):
        after = measure_before_and_after(subject, plan, report, streamable_steps(recipe.verify))[1]
    if not options.loaded:
        result["saved_differs"] = save_and_rescore(meter, subject, plan, report, options.out)
    means = torch.stack([acts[group].mean for group in ("target", "control")])
    torch.save({"means": means, "basis": directions.basis}, f"{options.out}.pt")
    return result | {"scores": {name: score.value for name, score in after.scores.items()}, "edits": len(plan.edits)}


def save_and_rescore(meter: Meter, subject: Subject, plan: Plan, report: PromptSet, out: Path) -> float:
    """Bake the plan, and score some prompts live and as saved.

    Returns the largest difference of first-token probabilities, relative to the largest probability.
    """
    files = find_base_checkpoint(subject)
    assert files is not None, "the subject was opened from files"
    out.mkdir(parents=True)
    with meter.stage("SAVE"):
        bake_into_checkpoint(BaseCheckpoint(subject, files, find_tied_ends(subject)), plan, out)
        copy_side_files(Path(subject.source.id), out)
    ids = render_prompts(subject, report["control"][:SCORED])
    with meter.stage("SCORE live"), applied(subject, plan):
        live = first_token_log_probs(subject, ids)
    with meter.stage("SCORE saved", out):
        saved = first_token_log_probs(open_offloaded(out), ids)
    return float((saved.exp() - live.exp()).abs().max() / live.exp().max())


if __name__ == "__main__":
    run_process()
