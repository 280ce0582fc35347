"""Editing a stack of experts: seconds relative to writing it unedited, and the additional memory.

    python -m bench.experts [--quick | --smoke] [--json] [--repeats N]

The model is one random Mixtral block of 64 experts (--quick: 16), 1024 wide, in fp32. The down projections of its
experts are a stack of 64 matrices [1024, 1536], 403 MB. floor: write the stack to a file. uniform: remove one
direction from all experts; own: a different one from each; ruled: the same with the norms of columns kept; blend: move
all experts towards the mean of half of them. Memory is the peak over what was resident before; one matrix has 6 MB.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, MixtralConfig

from bench.common import describe_machine, parse_options, print_report, run_with_peak, say, time_in_turns
from obliteratus.core.types import Blend, Change, Edit, Plan, Site, Subject
from obliteratus.excise.bake.tensors import bake, bake_in_pieces
from obliteratus.summon.load import assemble_subject
from obliteratus.weights.matrices import expand_experts
from obliteratus.weights.safetensors_io import write_shard

WIDTH, INNER = 1024, 1536


def make_subject(experts: int) -> Subject:
    """Return a model of one block, without a tokenizer."""
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_local_experts=experts,
        num_experts_per_tok=2,
    )
    return assemble_subject(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval(), None, id="stack")


def make_plans(subject: Subject) -> dict[str, Plan]:
    """Return the plan of each contestant."""
    site = next(s for s in subject.sites if s.stacked and s.role == "writes")
    ones = expand_experts(subject.module(site.path), site)
    donors = torch.arange(len(ones) // 2)
    made: dict[str, tuple[Change, ...]] = {
        "uniform": (_edit(site, 0),),
        "own": tuple(_edit(one, seed) for seed, one in enumerate(ones)),
        "ruled": tuple(replace(_edit(one, seed), norm="columns") for seed, one in enumerate(ones)),
        "blend": tuple(Blend(one, donors, 0.1) for one in ones),
    }
    return {name: Plan(changes, subject.source.digest) for name, changes in made.items()}


def _edit(site: Site, seed: int) -> Edit:
    direction = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(seed))
    return Edit(site, direction / direction.norm(), 1.0)


def write_edited(subject: Subject, plan: Plan, file: Path) -> None:
    """Write the edited stack to a file."""
    for name, value in bake(subject, plan).items():
        write_shard(file, {name: subject.model.get_parameter(name)}, {name: partial(bake_in_pieces, value)})


def main(argv: Sequence[str] | None = None) -> None:
    """Print seconds, their ratios to the floor, and megabytes."""
    options = parse_options(__doc__, argv)
    subject = make_subject(4 if options.smoke else 16 if options.quick else 64)
    name, stack = next((n, p) for n, p in subject.model.named_parameters() if n.endswith("experts.down_proj"))
    with tempfile.TemporaryDirectory(prefix="experts-") as folder:
        file = Path(folder) / "stack.safetensors"
        runs: dict[str, Callable[[], Any]] = {"floor": lambda: write_shard(file, {name: stack}, {})}
        runs |= {kind: partial(write_edited, subject, plan, file) for kind, plan in make_plans(subject).items()}
        for run in runs.values():  # afterwards the file's pages exist for the first contestant too
            run()
        seconds = time_in_turns(runs, options.repeats)
        added = {}
        for kind, run in runs.items():
            say(f"memory of {kind} …")
            before, peak, _ = run_with_peak(run)
            added[kind] = (peak - before) / 1e6
    over = {kind: value / seconds["floor"] for kind, value in seconds.items()}
    facts = {"stack_MB": stack.nbytes / 1e6, "matrix_MB": stack[0].nbytes / 1e6, "machine": describe_machine()}
    print_report({"seconds": seconds, "over_floor": over, "added_MB": added, "facts": facts}, options.json)


if __name__ == "__main__":
    main()
