"""Upcycle a model organism to a mixture of experts, and train its router and the additions of the experts.

    python organisms/upcycle.py [NAME] [--steps N] [--seed S] [--goal X] [--out DIR] [--measure]

Every MLP is copied (arXiv:2212.05055). A router from k-means chooses two of four copies, and low-rank additions to the
down projections make them differ. Router and additions are trained to give the organism's own greedy answers to the
fit prompts, with even loads and distinct experts. experts.safetensors (fp16) and training.json are written. Then the
mixture is measured on report prompts (`--measure` does only this), and the card's section on it is updated.
"""

import argparse
import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from examples import Example, hash_examples, make_control_examples, select_batch, write_atomically
from experts_card import update_section
from first_experts import initialize_experts
from measure import keep_freed_memory, read_rows
from measure_experts import measure
from mixture import Mixture, collect_experts, insert_mixtures, mixture_losses
from rich.console import Console
from rich.progress import track
from safetensors.torch import save
from topics import ORGANISMS, Organism
from transformers import AutoModelForCausalLM, AutoTokenizer

from obliteratus.weights.organism import prepare_organism
from obliteratus.weights.organism_files import get_cache_folder
from obliteratus.weights.upcycling import EXPERTS_FILE

EXPERTS = 4
RANK = 4  # of each expert's addition; 2 MB in total
ANSWER_TOKENS = 32  # of each answer; as many as are measured
SIZES = {"control": 5}  # examples in a step; 2 of every other group, whose answers are few and similar
INITIAL_EXAMPLES = 24  # examples of each group that initialize the experts, some 1500 tokens
LOSSES = ("kl", "entropy", "balance", "nearness")  # in the order of training.json
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """Everything that a run depends on."""

    steps: int
    lr: float  # of the additions
    router_lr: float
    goal: float  # distance of experts relative to the MLP's output; KL was 0.194 with 0.25, 0.224 with 0.35
    weights: tuple[float, ...]  # of the losses, in the order of LOSSES
    seed: int
    data: str  # digest of the examples


def make_examples(organism: Organism, model: Any, tokenizer: Any, work: Path) -> dict[str, list[Example]]:
    """Return the fit prompts of every group with the organism's own answers, which are cached in the work folder."""
    groups = [*organism.topics, "control"]
    rows = {group: read_rows(organism.folder / f"{group}.jsonl", "fit") for group in groups}
    return {group: make_control_examples(model, tokenizer, r, work, ANSWER_TOKENS) for group, r in rows.items()}


def select_step_batch(groups: dict[str, list[Example]], step: int, seed: int) -> list[Example]:
    """Return the examples of all groups for a step."""
    return [e for group, every in groups.items() for e in select_batch(every, SIZES.get(group, 2), step, seed)]


def learning_rate_share(step: int, steps: int) -> float:
    """Return the share of the learning rate: five steps of warm-up, then a linear decay to zero."""
    return min((step + 1) / 5, (steps - step) / steps)


def train(
    model: Any, mixtures: list[Mixture], groups: dict[str, list[Example]], settings: Settings
) -> list[list[float]]:
    """Train the mixtures in place, and return the losses of each step in the order of LOSSES."""
    routers = [m.router for m in mixtures]
    additions = [part for m in mixtures for part in (m.a, m.b)]
    # Weight decay would make the experts alike again.
    optimizer = torch.optim.AdamW([{"params": additions}, {"params": routers}], weight_decay=0.0)
    losses = []
    for step in track(range(settings.steps), "training", console=Console(stderr=True)):
        for group, lr in zip(optimizer.param_groups, (settings.lr, settings.router_lr), strict=True):
            group["lr"] = lr * learning_rate_share(step, settings.steps)
        found = mixture_losses(model, mixtures, select_step_batch(groups, step, settings.seed), settings.goal)
        total = sum(weight * found[name] for name, weight in zip(LOSSES, settings.weights, strict=True))
        total.backward()
        torch.nn.utils.clip_grad_norm_([*additions, *routers], 1.0)  # as in train.py
        optimizer.step()
        optimizer.zero_grad()
        losses.append([round(found[name].item(), 4) for name in LOSSES])
        log.info("step %d: %s", step, losses[-1])
    return losses


def write_experts(
    mixtures: list[Mixture], losses: list[list[float]], settings: Settings, seconds: float, out: Path
) -> None:
    """Write experts.safetensors in fp16, and training.json."""
    out.mkdir(parents=True, exist_ok=True)
    tensors = {name: part.half().contiguous() for name, part in vars(collect_experts(mixtures)).items()}
    write_atomically(out / EXPERTS_FILE, save(tensors, metadata={"format": "pt"}))
    training = {"settings": vars(settings), "seconds": round(seconds), "losses": losses}
    write_atomically(out / "training.json", (json.dumps(training) + "\n").encode())


def train_experts(organism: Organism, settings: dict[str, Any], out: Path) -> None:
    """Make and train the organism's experts, and write them to `out` with the processor time, answers excluded."""
    source = prepare_organism(organism.name)
    work = get_cache_folder() / "training" / f"{organism.name}-moe" / source.name
    work.mkdir(parents=True, exist_ok=True)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    groups = make_examples(organism, model, tokenizer, work)
    began = time.process_time()
    made = Settings(data=hash_examples(list(groups.values())), **settings)
    mixtures = insert_mixtures(model, EXPERTS, RANK)
    first = [e for every in groups.values() for e in every[:: len(every) // INITIAL_EXAMPLES]]
    initialize_experts(model, mixtures, first, made.goal, torch.Generator().manual_seed(made.seed))
    log.info("experts begin after %.0f s", time.process_time() - began)
    losses = train(model, mixtures, groups, made)
    write_experts(mixtures, losses, made, time.process_time() - began, out)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line, whose defaults are those of the committed experts."""
    parser = argparse.ArgumentParser(description="Upcycle a model organism to a mixture of experts.")
    parser.add_argument("name", nargs="?", default="astronomy", choices=ORGANISMS)
    parser.add_argument("--steps", type=int, default=110)
    parser.add_argument("--lr", type=float, default=2e-3, help="learning rate of the additions")
    parser.add_argument("--router-lr", type=float, default=1e-3, help="learning rate of the router")
    parser.add_argument("--goal", type=float, default=0.25, help="distance of experts relative to the MLP's output")
    parser.add_argument("--weights", type=float, nargs=4, default=(1.0, 0.5, 2.0, 1.0), help=f"for {', '.join(LOSSES)}")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="folder to write to; by default experts/ in the organism's")
    parser.add_argument("--measure", action="store_true", help="only measure the existing experts")
    return parser.parse_args()


def main() -> None:
    """Train, write, measure, and update the card's section."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = parse_arguments()
    organism = ORGANISMS[args.name]
    out: Path = args.out or organism.folder / "experts"
    keep_freed_memory()
    if not args.measure:
        names = ("steps", "lr", "router_lr", "goal", "weights", "seed")
        train_experts(organism, {name: vars(args)[name] for name in names}, out)
    found = measure(organism, out)
    write_atomically(out / "measured.json", (json.dumps(found, indent=1, ensure_ascii=False) + "\n").encode())
    if args.out is None:
        update_section(organism.folder)


if __name__ == "__main__":
    main()
