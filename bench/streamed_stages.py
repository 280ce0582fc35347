"""One process of `bench.streaming`: probe, edit, verify and save a checkpoint, and what each stage took. Linux only."""

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

from obliteratus.causal import FitContext
from obliteratus.core.run_folder import Store
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
from obliteratus.pipeline.offloaded import adapt_recipe, compared, measured
from obliteratus.pipeline.recipe import load_recipe
from obliteratus.probe.probe import collect_activations
from obliteratus.prompts import load_prompts
from obliteratus.summon.load import open_subject
from obliteratus.summon.load_offloaded import open_offloaded
from obliteratus.summon.sites import find_tied_ends
from obliteratus.summon.summary import summarize_model
from obliteratus.verify.before_and_after import streamable_steps
from obliteratus.weigh import weigh_sites


def limit_memory(bytes_: int) -> None:
    """The system refuses this process any more memory than that, mapped files and code included."""
    if bytes_:
        resource.setrlimit(resource.RLIMIT_AS, (bytes_, bytes_))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--limit", type=int, default=0, help="of the system, in bytes; 0: none")
    parser.add_argument("--memory", type=float, default=math.inf, help="the program's own budget, in bytes")
    parser.add_argument("--loaded", action="store_true", help="all weights in memory")
    parser.add_argument("--cold", action="store_true", help="the file cache forgets the checkpoint before each stage")
    parser.add_argument("--forecast", action="store_true", help="only say what `inspect --memory` expects")
    parser.add_argument("--prompts", type=int, default=96, help="of each group")
    return parser.parse_args()


class Meter:
    """Seconds, and bytes that the disk had to give, by stage."""

    def __init__(self, folder: Path, cold: bool) -> None:
        self.folder, self.cold, self.stages = folder, cold, dict[str, dict[str, float]]()

    @contextmanager
    def stage(self, name: str, *folders: Path) -> Iterator[None]:
        """folders: of which the file cache is to know nothing, beside the checkpoint's."""
        for folder in (self.folder, *folders) if self.cold else ():
            _forget(folder)
        Path("/proc/self/clear_refs").write_text("5")  # the peak is of this stage
        start, read = time.perf_counter(), _read_bytes()
        yield
        self.stages[name] = {"seconds": time.perf_counter() - start, "read": _read_bytes() - read, "peak": _peak()}
        print(name, self.stages[name], file=sys.stderr, flush=True)


def _forget(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _read_bytes() -> int:
    """What this process had read from disk, not from the file cache."""
    told = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(told["read_bytes"])


def _peak() -> int:
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index("VmHWM:") + 1]) * 1024


def main() -> None:
    """Prints JSON."""
    options = arguments()
    limit_memory(options.limit)
    logging.disable_progress_bar()
    meter = Meter(options.folder, options.cold)
    with memory_limit(options.memory):
        told = (forecast if options.forecast else run_stages)(meter, options)
    peak = max((stage["peak"] for stage in meter.stages.values()), default=0)
    print(json.dumps(told | {"stages": meter.stages, "peak": peak, "prompts": options.prompts}))


def take_prompts(made: Recipe, prompts: int) -> tuple[PromptSet, PromptSet]:
    """Prompts to fit on, and those to report on; so many of each group."""
    fit, _, report = load_prompts("organism:astronomy", "organism:astronomy").split(made.seed)
    first, last = (PromptSet({g: ps[:prompts] for g, ps in part.groups.items()}) for part in (fit, report))
    return first, last


def forecast(meter: Meter, options: argparse.Namespace) -> dict[str, Any]:
    """The planner's word on each stage, with the files in the cache or not, as the run will find them."""
    made = load_recipe("advanced")
    with meter.stage("FORECAST"):
        subject = open_offloaded(options.folder)
        suited = adapt_recipe(subject, made)
        stages = forecast_stages(
            summarize_model(str(options.folder)), subject, suited, *take_prompts(made, options.prompts)
        )
    return {"expected": {name: stage._asdict() for name, stage in stages.items()}, "passes": suited.passes}


def run_stages(meter: Meter, options: argparse.Namespace) -> dict[str, Any]:
    """All stages; what PROBE and DISTILL found is kept in OUT.pt."""
    made, told = load_recipe("advanced"), dict[str, Any]()
    fit, report = take_prompts(made, options.prompts)
    with meter.stage("SUMMON"):
        subject = (open_subject if options.loaded else open_offloaded)(options.folder)
    with meter.stage("PROBE"):
        acts = collect_activations(subject, fit, made.probe)
    with meter.stage("EXCISE"):
        directions = find_directions(acts, made.distill, FitContext(subject, fit))
        plan = plan_edits(
            subject, directions, weigh_sites(directions, subject.sites, acts, made.weigh), acts, made.excise
        )
    with meter.stage("VERIFY"):
        steps, store = streamable_steps(made.verify), Store()
        before = measured(store, "VERIFY before", subject, report, steps) if options.loaded else None
        after = compared(store, subject, plan, report, steps, before)[1]
    if not options.loaded:
        told["saved_differs"] = save_and_rescore(meter, subject, plan, report, options.out)
    means = torch.stack([acts[group].mean for group in ("target", "control")])
    torch.save({"means": means, "basis": directions.basis}, f"{options.out}.pt")
    return told | {"scores": {name: score.value for name, score in after.scores.items()}, "edits": len(plan.edits)}


def save_and_rescore(meter: Meter, subject: Subject, plan: Plan, report: PromptSet, out: Path) -> float:
    """Bake the plan, and score some prompts live and as saved: the largest difference of first tokens' probabilities,
    relative to the largest of them."""
    files = find_base_checkpoint(subject)
    assert files is not None, "it was opened from files"
    out.mkdir(parents=True)
    with meter.stage("SAVE"):
        bake_into_checkpoint(BaseCheckpoint(subject, files, find_tied_ends(subject)), plan, out)
    ids = render_prompts(subject, report["control"][:SCORED])
    with meter.stage("SCORE live"), applied(subject, plan):
        live = first_token_log_probs(subject, ids)
    with meter.stage("SCORE saved", out):
        again = first_token_log_probs(open_offloaded(out), ids)
    return float((again.exp() - live.exp()).abs().max() / live.exp().max())


if __name__ == "__main__":
    main()
